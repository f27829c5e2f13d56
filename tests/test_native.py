"""The C++ operators are built once, and nothing fails where they cannot be built."""

import os
import subprocess
import sys
from pathlib import Path

CODE = "from vllm_eagle import native; print(native.problem(), native.runs())"


def told(cache: Path, **environment: str) -> str:
    """What another process says of them."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)} | environment
    return subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_built_once(tmp_path: Path) -> None:
    assert told(tmp_path) == "None True"
    (library,) = (tmp_path / "vllm_eagle").iterdir()
    built = library.stat().st_mtime_ns
    assert told(tmp_path, CXX="no-such-compiler") == "None True"  # nothing to compile any more
    assert library.stat().st_mtime_ns == built
    library.write_bytes(b"cut off")
    assert told(tmp_path) == "None True"  # built anew


def test_no_compiler(tmp_path: Path) -> None:
    assert told(tmp_path, CXX="no-such-compiler") == "no C++ compiler: install g++, or set CXX to one False"


def test_broken_compiler(tmp_path: Path) -> None:
    found = told(tmp_path, CXX="false")
    assert "failed with status 1" in found
    assert found.endswith("False")
    assert not list((tmp_path / "vllm_eagle").iterdir())


def test_switched_off(tmp_path: Path) -> None:
    assert told(tmp_path, VLLM_EAGLE_NATIVE="0") == "switched off by VLLM_EAGLE_NATIVE=0 False"
