"""`vllm-eagle doctor`: what it says of the libraries that make vLLM fast on CPUs."""

from pathlib import Path

import pytest

from vllm_eagle import native
from vllm_eagle.commands import doctor
from vllm_eagle.engine import seams


@pytest.mark.parametrize(
    ("preloaded", "missing"),
    [
        ("", ["libtcmalloc", "libiomp5"]),
        ("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4", ["libiomp5"]),
        ("/venv/lib/libiomp5.so", ["libtcmalloc"]),
        ("/usr/lib/libtcmalloc.so.4:/venv/lib/libiomp5.so", []),
    ],
)
def test_what_is_not_preloaded_is_named(monkeypatch: pytest.MonkeyPatch, preloaded: str, missing: list[str]) -> None:
    monkeypatch.setenv("LD_PRELOAD", preloaded)
    monkeypatch.setattr(native, "problem", lambda: None)
    found = [(status, detail) for status, what, detail in doctor._cpu_findings() if what == "LD_PRELOAD"]
    assert [detail.split()[0] for status, detail in found if status == "note"] == missing
    assert all("is not preloaded" in detail for status, detail in found if status == "note")
    assert len(found) == 2
    assert {status for status, _ in found} <= {"ok", "note"}  # slower, but it works


def test_nothing_is_preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(native, "problem", lambda: "no C++ compiler")
    assert [status for status, _, _ in doctor._cpu_findings()] == ["note"] * 3


def test_the_version_of_vllm_comes_with_what_was_run_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> dict[str, tuple[str, str]]:
        return {what: (status, detail) for status, what, detail in doctor._findings()}

    status, detail = found()["vllm version"]
    assert status == "ok"
    assert any(detail.endswith(f"{version}: {run}") for version, run in seams.TESTED_VERSIONS.items())
    assert found()["vllm seams"] == ("ok", "signatures and bodies as tested")
    monkeypatch.setattr(seams, "changed_bodies", lambda: ["X.y has another body"])
    assert found()["vllm seams"] == ("note", "X.y has another body")
    monkeypatch.setattr(seams, "known_version", lambda: None)
    monkeypatch.setattr(seams, "version_problem", lambda: "not tested")
    assert found()["vllm version"] == ("FAIL", "not tested")


def test_without_git_everything_else_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(native, "problem", lambda: None)  # that a compiler is missing, too, is said elsewhere
    [patch] = [detail for _, what, detail in doctor._findings() if what == "patch cpu_worker_factory"]
    assert patch.startswith("state unknown: git is not in PATH, and patches are applied with it; install git; without it: ")
