"""Our C++ operators for CPUs: torch.ops.vllm_eagle, built on first use by the compiler at hand.

vLLM's own compilation needs a C++ compiler on CPU, too. Where there is none, or with VLLM_EAGLE_NATIVE=0, plain torch does the same
work more slowly. The library is built for this machine and this torch, so its name tells both; caches may be shared.

It lies in $XDG_CACHE_HOME or ~/.cache. A user without a home, as in containers that run under any number, gets a folder among the
temporary files. Its path is no secret, so it is used only if it belongs to this user and to nobody else: a library is code.
"""

import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch.utils import cpp_extension

logger = logging.getLogger(f"vllm.{__name__}")  # below "vllm", so that vLLM shows it with its own lines

FILES = sorted(Path(__file__).parent.glob("*.[ch]*"))
SWITCH = "VLLM_EAGLE_NATIVE"
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
_BUILD_S = 300  # a build that takes longer than this hangs


@cache
def problem() -> str | None:
    """Load the operators, building them if need be; why that is impossible, or None."""
    if os.environ.get(SWITCH) == "0":
        return f"switched off by {SWITCH}=0"
    try:
        path = _path()
        try:
            torch.ops.load_library(path)
        except OSError:  # not there yet, or cut off
            _build(path)
            torch.ops.load_library(path)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning("Without the C++ operators of vllm_eagle, plain torch does their work, more slowly: %s", error)
        return str(error)
    return None


def runs() -> bool:
    """Whether torch.ops.vllm_eagle is there."""
    return problem() is None


def _path() -> Path:
    """Where the library for these sources, this torch and this CPU lies."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))][:1]
    parts = [torch.__version__, platform.machine(), *cpu, *_FLAGS, *(file.read_text() for file in FILES)]
    return _folder() / f"native_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"


def _folder() -> Path:
    """Where libraries of this user lie; it exists.

    Raises:
        RuntimeError: there is only one that others could write to.
        OSError: there is none, and none can be made.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm_eagle"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except (OSError, RuntimeError):  # home is read-only, or the user has none
        folder = Path(tempfile.gettempdir(), f"vllm_eagle_{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()  # of a link itself, too: it may lead into somebody else's folder
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise RuntimeError(f"others may write to {folder}: remove it, or set XDG_CACHE_HOME to a folder of yours") from None
        return folder


def _build(path: Path) -> None:
    """Compile to a folder of our own, then move: builds side by side do no harm, and none waits for another."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise RuntimeError("no C++ compiler: install g++, or set CXX to one")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder, path.name)
        command = [
            *(compiler, *_FLAGS),
            *(f"-I{include}" for include in cpp_extension.include_paths()),
            *(str(file) for file in FILES if file.suffix == ".cpp"),
            *(f"-L{library}" for library in cpp_extension.library_paths()),
            *("-lc10", "-ltorch_cpu", "-o", str(built)),
        ]
        logger.info("Building the C++ operators of vllm_eagle, once: %s", path)
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_S, check=False)
        if done.returncode:
            raise RuntimeError(f"{compiler} failed with status {done.returncode}: {done.stderr[-500:]}")
        built.rename(path)
