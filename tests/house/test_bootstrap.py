"""Set-up starts with a bare Python, which may be the wrong one."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from vllm_eagle import bootstrap

ROOT = Path(__file__).parents[2]
LOCKS = {name: (ROOT / "vllm_eagle" / "locks" / f"{name}.lock").read_text() for name in ("cpu", "dev", "interop")}
PINS = {
    name: {canonicalize_name(pin): version for pin, version in re.findall(r"^([\w.-]+)==(.+)$", text, re.M)}
    for name, text in LOCKS.items()
}
# Left out of the locks on purpose (.ci/lock); interop.lock has a triton for tests.
LEFT_OUT = {"torchaudio", "torchcodec", "torchvision", "triton"}


def test_it_runs_with_nothing_installed() -> None:
    """-S: without site-packages, so without numpy, as on a fresh machine."""
    command = [sys.executable, "-S", "-m", "vllm_eagle.bootstrap", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--dev" in done.stdout
    bare = subprocess.run([sys.executable, "-S", "-c", "import numpy"], capture_output=True, check=False)
    assert bare.returncode != 0, "numpy is here all the same, so this test shows nothing"


def test_the_package_has_what_it_names() -> None:
    import vllm_eagle

    for name in vllm_eagle.__all__:
        assert getattr(vllm_eagle, name).__name__ == name


@pytest.mark.parametrize("version", [(3, 6), (3, 10), (3, 14)])
def test_other_pythons_are_told_what_to_type(version: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    nothing = bootstrap.refusal(version, ["--dev"])
    assert nothing is not None
    assert f"this is Python {version[0]}.{version[1]}" in nothing
    assert "Install one of them" in nothing
    # What does not run, as the stand-ins of version managers, is passed over.
    for name, status in (("python3.11", 127), ("python3.13", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    told = bootstrap.refusal(version, ["--dev"])
    assert told is not None
    assert told.endswith("Type: python3.13 -m vllm_eagle.bootstrap --dev")
    assert "\n" not in told + nothing


def test_supported_pythons_are_not_refused() -> None:
    assert [bootstrap.refusal(version, []) for version in bootstrap.PYTHONS] == [None] * 3


def test_an_environment_of_another_python_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.10.13\n")
    assert bootstrap.main(["--venv", str(tmp_path)]) == 2
    assert f"{tmp_path} is of Python 3.10: remove it" in capsys.readouterr().err


def test_a_failure_shows_its_reason_and_where_the_rest_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pip that fails, after many warnings."""
    (tmp_path / "bin").mkdir()
    for name in ("pip", "python"):
        (tmp_path / "bin" / name).write_text(
            "#!/bin/sh\necho WARNING: odd\necho 'ERROR: No matching distribution for torch==9'\nexit 1\n"
        )
        (tmp_path / "bin" / name).chmod(0o755)
    assert bootstrap.main(["--venv", str(tmp_path), "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("1/2 vLLM 0.32 for CPU")
    assert err.splitlines()[0] == "ERROR: No matching distribution for torch==9"
    assert "PIP_EXTRA_INDEX_URL" in err
    assert "WARNING: odd" in (tmp_path / "bootstrap.log").read_text()


@pytest.mark.parametrize("name", LOCKS)
def test_locks_pin_every_package_once(name: str) -> None:
    lines = [line for line in LOCKS[name].splitlines() if not line.startswith("#")]
    assert LOCKS[name].startswith("# ")
    assert len(lines) == len(PINS[name])
    assert all(PINS[name].keys().isdisjoint(PINS[other]) for other in LOCKS if other != name)


@pytest.mark.parametrize("python", [f"{major}.{minor}" for major, minor in bootstrap.PYTHONS])
def test_locks_hold_for_every_python(python: str) -> None:
    """They are installed without asking what packages need: so each of what they need must be in them, in a version that fits."""
    environment = default_environment() | {"python_version": python, "python_full_version": f"{python}.9"}
    pins = PINS["cpu"] | PINS["dev"]
    extras = {"ray": {"data", "serve"}}
    wrong = []
    for name in pins:
        package = importlib.metadata.distribution(name)
        if not SpecifierSet(package.metadata.get("Requires-Python") or "").contains(f"{python}.9"):
            wrong.append(f"{name} is not for Python {python}")
        for needed in map(Requirement, package.requires or ()):
            here = (environment | {"extra": extra} for extra in extras.get(name, {""}))
            key = canonicalize_name(needed.name)
            if key in LEFT_OUT or not (needed.marker is None or any(map(needed.marker.evaluate, here))):
                continue
            if key not in (PINS["cpu"] if name in PINS["cpu"] else pins) or not needed.specifier.contains(
                pins[key], prereleases=True
            ):
                wrong.append(f"{name} needs {needed}, the locks have {pins.get(key)}")
    assert wrong == []
