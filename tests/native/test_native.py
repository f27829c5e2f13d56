"""The C++ operators are built once, and nothing fails where they cannot be built."""

import os
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_eagle import native

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
    whole = tmp_path / "whole.so"
    whole.write_bytes(library.read_bytes())
    library.write_bytes(b"cut off")
    # A compiler that has its result ready: the real one takes a minute or more.
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ncp {whole} "$2"\n')
    compiler.chmod(0o755)
    assert told(tmp_path, CXX=str(compiler)) == "None True"  # built anew
    assert library.read_bytes() == whole.read_bytes()


WITH_FLAGS = """
import sys, pytest
from vllm_eagle import native
native._FLAGS = tuple(sys.argv[1] if flag == "-march=native" else flag for flag in native._FLAGS)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/attention/test_attention.py", "-k", "native"]))
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(platform.machine() != "x86_64", reason="-march=x86-64-v3")
def test_attention_is_right_without_what_this_cpu_has_beyond_avx2(tmp_path: Path) -> None:
    root, environment = Path(__file__).parents[2], os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", WITH_FLAGS, "-march=x86-64-v3"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
    assert list((tmp_path / "vllm_eagle").iterdir())  # built anew


def test_no_compiler(tmp_path: Path) -> None:
    assert told(tmp_path, CXX="no-such-compiler") == "no C++ compiler: install g++, or set CXX to one False"


def test_broken_compiler(tmp_path: Path) -> None:
    found = told(tmp_path, CXX="false")
    assert "failed with status 1" in found
    assert found.endswith("False")
    assert not list((tmp_path / "vllm_eagle").iterdir())


def test_switched_off(tmp_path: Path) -> None:
    assert told(tmp_path, VLLM_EAGLE_NATIVE="0") == "switched off by VLLM_EAGLE_NATIVE=0 False"


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As for a user who stands in no list of users: where the temporary files are."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_without_a_home_there_is_a_folder_of_ones_own(homeless: Path) -> None:
    folder = native._folder()
    assert folder == native._folder()
    assert folder.parent == homeless
    assert (folder.stat().st_uid, stat.S_IMODE(folder.stat().st_mode)) == (os.getuid(), 0o700)


def test_a_home_that_nothing_can_be_written_to(homeless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (homeless / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(homeless / "file"))  # fails for root, too
    assert native._folder().parent == homeless


def _open_to_others(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def _link(folder: Path) -> None:
    elsewhere = folder.with_name("elsewhere")
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)


@pytest.mark.parametrize("make", [_open_to_others, _link, pytest.param(lambda folder: folder.mkdir(0o700), id="other_owner")])
def test_nothing_is_loaded_from_where_others_could_put_it(homeless: Path, monkeypatch: pytest.MonkeyPatch, make: object) -> None:
    owner = os.getuid()
    if make not in (_open_to_others, _link):
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    make(homeless / f"vllm_eagle_{os.getuid()}")  # type: ignore[operator]
    loaded: list[object] = []
    monkeypatch.setattr(native.torch.ops, "load_library", loaded.append)
    monkeypatch.delenv(native.SWITCH, raising=False)
    native.problem.cache_clear()
    try:
        assert "others may write to" in (native.problem() or "")
        assert not native.runs()
        assert not loaded
    finally:
        native.problem.cache_clear()


def test_a_user_without_a_home_has_the_operators(tmp_path: Path) -> None:
    """In a process of its own; the library is there, so that nothing is compiled."""
    assert native.problem() is None
    folder = tmp_path / f"vllm_eagle_{os.getuid()}"
    folder.mkdir(mode=0o700)
    shutil.copy(native._path(), folder)
    code = "import pathlib\n\ndef home(): raise RuntimeError('no home')\n\npathlib.Path.home = home\n" + CODE
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    environment |= {"TMPDIR": str(tmp_path), "CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None True"


def test_a_user_without_a_home_and_without_a_compiler_goes_on_with_torch(homeless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.problem.cache_clear()
    try:
        assert native.problem() == "no C++ compiler: install g++, or set CXX to one"
    finally:
        native.problem.cache_clear()
