"""Layout rules: the algorithm never imports vLLM, nothing is assigned on vLLM's classes but the marked wraps."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "vllm_eagle"
FILES = sorted(ROOT.rglob("*.py"))
ALGORITHM = {
    "tree",
    "noise",
    "noise_rows",
    "node_noise",
    "config",
    "shapes",
    "draft",
    "verify",
    "accept",
    "compact",
    "metrics",
    "budget",
    "calibration",
    "cost_curve",
    "native",
    "ops",
}
MAY_IMPORT_VLLM = ("plugin.py", "llm.py", "demo.py", "doctor.py", "attention/", "engine/", "bench/", "serving/", "train/")


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def is_vllm(name: str) -> bool:
    return name == "vllm" or name.startswith("vllm.")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_some_files_import_vllm(path: Path) -> None:
    if any(is_vllm(name) for name in imported(ast.parse(path.read_text()))):
        assert str(path.relative_to(ROOT)).startswith(MAY_IMPORT_VLLM)


def test_the_algorithm_depends_on_itself_alone() -> None:
    for name in ALGORITHM:
        path = next(path for path in (ROOT / f"{name}.py", ROOT / name / "__init__.py") if path.is_file())
        ours = {n for n in imported(ast.parse(path.read_text())) if n.startswith("vllm_eagle.")}
        assert {n.split(".")[1] for n in ours} <= ALGORITHM, name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_assigned_on_vllm(path: Path) -> None:
    """`__class__` is set once, for the runner that CPUWorker has built; `setattr` stands in plugin.py's wrap alone."""
    tree = ast.parse(path.read_text())
    classes = [
        target
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute) and target.attr == "__class__"
    ]
    assert len(classes) == (path.name == "cpu_worker.py")
    calls = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert "setattr" not in calls or path.name == "plugin.py"
    modules = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.modules"]
    assert not modules


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
