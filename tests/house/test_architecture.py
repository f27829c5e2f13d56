"""Who may import whom: one table of rooms. And: nothing is assigned on vLLM's classes but the marked wraps, files are small."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "vllm_eagle"
FILES = sorted(ROOT.rglob("*.py"))

# room: rooms that it may import. A room is a folder, or a file of the top; "vllm" is vLLM itself.
ROOMS = {
    # what a step is made of: knows nothing of vLLM
    "ops": "",
    "native": "",
    "algorithm": "native ops",
    "budget": "",
    "metrics": "algorithm",
    # into vLLM
    "heads": "files",
    "options": "algorithm heads vllm",
    "attention": "algorithm native ops vllm",
    "engine": "algorithm attention budget heads metrics options vllm",
    "engine/v1": "algorithm attention budget engine metrics native options vllm",
    "engine/v2": "algorithm attention budget engine metrics ops options vllm",
    "serving": "algorithm metrics options vllm",
    "plugin": "algorithm engine heads options serving vllm",
    "llm": "options vllm",
    "__init__": "algorithm llm options",
    # heads: made and measured without vLLM; regenerate writes answers, or whole dialogues, with it
    "train": "",
    "train/features": "files",
    "train/data": "files",
    "train/head": "files heads train/features",
    "train/run": "algorithm evaluate files heads train/data train/features train/head train/regenerate",
    "train/regenerate": "bench/engines files train/data train/features vllm",
    "evaluate": "algorithm bench/engines files heads train/data train/features train/head",
    # measurements
    "bench": "",
    "bench/engines": "algorithm heads options train/data train/features vllm",
    "bench/passes": "algorithm bench/engines engine/v2 heads vllm",
    "bench/heads": "algorithm bench/engines bench/passes bench/speed evaluate heads pair train/data train/features train/head "
    "train/run vllm",
    "bench/recorded": "algorithm bench/engines budget heads pair vllm",
    "bench/speed": "attention bench/engines bench/recorded heads native ops vllm",
    "bench/soak": "bench/engines pair",
    "bench/gpu": "ops",
    # commands
    "files": "",
    "pair": "",
    "bootstrap": "",
    "commands": "algorithm bench/engines bench/passes bench/speed engine evaluate native pair train/data vllm",
    "cli": "bench/gpu bench/recorded commands heads train/regenerate train/run",
}


def room_of(path: Path) -> str:
    folder = path.relative_to(ROOT).parent
    return path.stem if folder == Path() else folder.as_posix()


def room_of_module(name: str) -> str | None:
    """The room of one of our modules or packages; None: not ours, or not in this folder (vllm_eagle.patches)."""
    if name == "vllm" or name.startswith("vllm."):
        return "vllm"
    if not name.startswith("vllm_eagle."):
        return None
    path = ROOT.joinpath(*name.split(".")[1:])
    if path.is_dir():
        return path.relative_to(ROOT).as_posix()
    return room_of(path.with_suffix(".py")) if path.with_suffix(".py").is_file() else None


def imported(path: Path) -> Iterator[str]:
    """Rooms that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` or `from module import name`
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if room_of_module(name) else node.module for name in inner]
        else:
            continue
        for name in names:
            room = room_of_module(name)
            if room is not None and room != room_of(path):
                yield room


def test_rooms_import_what_the_table_says() -> None:
    found: dict[str, dict[str, list[str]]] = {room: {} for room in ROOMS}
    for path in FILES:
        for room in imported(path):
            found.setdefault(room_of(path), {}).setdefault(room, []).append(str(path.relative_to(ROOT)))
    lines = []
    for room, arrows in found.items():
        allowed = set(ROOMS.get(room, "").split())
        if room not in ROOMS:
            lines.append(f"{room}: a new room; give it a line in ROOMS")
        lines += [f"{room} imports {other}, which the table does not allow: {', '.join(sorted(set(files)))}"
                  for other, files in arrows.items() if other not in allowed]  # fmt: skip
        lines += [f"{room} no longer imports {other}; remove it from the table" for other in sorted(allowed - arrows.keys())]
    assert not lines, "\n" + "\n".join(lines)


def test_rooms_have_no_circles() -> None:
    TopologicalSorter({room: allowed.split() for room, allowed in ROOMS.items()}).prepare()


def test_the_algorithm_knows_nothing_of_vllm() -> None:
    for room in ("algorithm", "budget", "metrics", "ops", "native"):
        assert "vllm" not in ROOMS[room].split()


@pytest.mark.parametrize("room", sorted({room.split("/")[0] for room in ROOMS} - {"__init__"}))
def test_the_map_names_every_room(room: str) -> None:
    """`vllm_eagle/__init__.py` is where a newcomer looks."""
    name = f"{room}/" if (ROOT / room).is_dir() else f"{room}.py"
    assert name in (ROOT / "__init__.py").read_text()


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
