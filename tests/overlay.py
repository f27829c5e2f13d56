"""A vLLM that has no CPU wheel (yet), on a CPU: `python -m tests.overlay 0.33.0 FOLDER`, with the Python of a set-up environment.

The Python files of the CUDA wheel, over the compiled modules of the CPU wheel that is installed here. It shows what changed in
vLLM's Python, where our overrides are, before there is a wheel; not what changed in its C++. For developers: CI does not run it.

FOLDER becomes a virtual environment of its own vllm (50 MB; the wheel, 340 MB, is deleted) that finds everything else in this
one, which is left as it is and must stay.
"""

import argparse
import email
import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

BASE = Path(sysconfig.get_path("purelib"))
# Of a CUDA wheel: compiled, or compiled on a GPU when it is first used.
COMPILED = {".so", ".h", ".hpp", ".inl", ".cu", ".cuh", ".cpp"}
# What the CUDA wheel requires and no CPU imports; torch stays the one that the compiled modules were built for.
NOT_FOR_CPUS = {
    *("torch", "torchaudio", "torchvision", "torchcodec", "triton", "apache-tvm-ffi", "fastsafetensors", "flashinfer-python"),
    *("humming-kernels", "instanttensor", "nvidia-cudnn-frontend", "nvidia-cutlass-dsl", "nvtx", "pynvvideocodec"),
    *("quack-kernels", "tilelang", "tokenspeed-mla"),
}
# vLLM starts its processes by spawning, which imports the script again.
SCRIPT = "#!{python}\nimport sys\nfrom {module} import main\nif __name__ == '__main__':\n    sys.exit(main())\n"


def main() -> int:
    """Make the environment; says in one line what is wrong if it cannot."""
    parser = argparse.ArgumentParser(prog="python -m tests.overlay", description=__doc__)
    parser.add_argument("version", help="of vLLM, for instance 0.33.0")
    parser.add_argument("folder", type=Path, help="of the new environment; must not exist")
    args = parser.parse_args()
    try:
        _make(args.version, args.folder.absolute())
    except (OSError, ValueError, zipfile.BadZipFile, subprocess.CalledProcessError) as error:
        print(f"overlay: {error}", file=sys.stderr)
        return 1
    return 0


def _make(version: str, folder: Path) -> None:
    if folder.exists():
        raise ValueError(f"{folder} exists; name a new folder, or remove it")
    modules = sorted((BASE / "vllm").glob("**/*.so"))
    if "+cpu" not in _installed("vllm") or not modules:
        raise ValueError(f"{sys.executable} has no CPU build of vLLM; run this with the Python that vllm_eagle.bootstrap set up")
    with tempfile.TemporaryDirectory(prefix="overlay-") as download:
        wheel = _download(version, Path(download))
        print(f"wheel         {wheel.name}, {wheel.stat().st_size >> 20} MB")
        try:
            python, site = _environment(folder)
            _lay(wheel, site, modules)
            newer = list(_newer_requirements(wheel))
            if newer:
                _pip("install", "--no-deps", *newer, python=python)
            print(f"newer here    {', '.join(newer) or 'nothing'} (without dependencies)")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    print(f"environment   {folder}, {size >> 20} MB beside {BASE.parents[2]}, which it needs")
    print(f"Try: {python} -m tests.seams {sys.executable}\nand: {python} -m pytest -q tests/engine/test_engine.py")


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _pip(*arguments: str, python: Path = Path(sys.executable)) -> None:
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.splitlines() or ["no message"]
        errors = [line for line in lines if line.startswith("ERROR: ") and not line.endswith("Exception:")]
        raise ValueError(f"pip {arguments[0]}: {(errors or lines)[-1].removeprefix('ERROR: ')}")


def _download(version: str, folder: Path) -> Path:
    _pip("download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), f"vllm=={version}")
    return next(folder.glob("vllm-*.whl"))


def _environment(folder: Path) -> tuple[Path, Path]:
    """Python and site-packages of a new environment that finds what it has not in this one, entry points and .pth files too."""
    venv.create(folder, with_pip=True)
    site = folder / BASE.relative_to(sys.prefix)
    (site / "overlay.pth").write_text(f"import site; site.addsitedir({str(BASE)!r})\n")
    python = folder / "bin" / "python"
    for name, module in (("vllm", "vllm.entrypoints.cli.main"), ("vllm-eagle", "vllm_eagle.cli")):
        script = folder / "bin" / name
        script.write_text(SCRIPT.format(python=python, module=module))
        script.chmod(0o755)
    return python, site


def _lay(wheel: Path, site: Path, modules: list[Path]) -> None:
    """Files of the wheel, links to the compiled modules, and a version that says what this is."""
    public = wheel.name.split("-")[1]
    version = f"{public}+cpu"  # by which vLLM tells that it is to run on a CPU
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith("vllm/") and Path(n).suffix not in COMPILED and n != "vllm/vllm-rs"]
        archive.extractall(site, names)
    for module in modules:
        link = site / module.relative_to(BASE)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(module)
    file = site / "vllm" / "_version.py"
    text = file.read_text()
    if f"'{public}'" not in text:
        raise ValueError(f"the wheel's _version.py does not say {public}")
    file.write_text(text.replace(f"'{public}'", f"'{version}'"))
    information = site / f"vllm-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (information / "INSTALLER").write_text("tests.overlay\n")
    print(f"vllm          {version}: {len(names)} files of the wheel, {len(modules)} compiled modules of vllm {_installed('vllm')}")


def _newer_requirements(wheel: Path) -> Iterator[str]:
    """What the wheel requires and this environment has not, or has too old."""
    from pip._vendor.packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    for text in metadata.get_all("Requires-Dist") or ():
        requirement = Requirement(text)
        if requirement.name.lower() in NOT_FOR_CPUS or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found = _installed(requirement.name)
        if not found or not requirement.specifier.contains(found, prereleases=True):
            yield f"{requirement.name}{requirement.specifier}"


if __name__ == "__main__":
    sys.exit(main())
