import os
import shutil
import tempfile

# Before vLLM is imported: engines in this process, no hub, one thread so that a busy machine does not stall in barriers.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

from tests import models, starts
from tests.serving.server import TREES, Pair, servers

settings.register_profile("project", deadline=None, max_examples=60)
settings.load_profile("project")

STARTS = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    """The run itself, not one of its processes, counts what is started."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="starts-")
        config.stash[STARTS] = Path(folder, "starts")
        starts.begin(config.stash[STARTS], limited=config.option.markexpr == "not exhaustive and not interpreted")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.write_line(starts.summary(config.stash[STARTS]))


def pytest_unconfigure(config: pytest.Config) -> None:
    if STARTS in config.stash:
        shutil.rmtree(config.stash[STARTS].parent, ignore_errors=True)


def shares_servers(path: str) -> bool:
    """Whether a file's tests ask the `pair` of servers."""
    return path.startswith(("tests/serving/test_serve_", "tests/serving/test_examples_serve"))


# Files that take minutes, the longest first: left to the end, one process would run them while the others are done.
_LONG = ("server_faults", "whole", "exactness", "ray", "soak", "throughput", "engine", "combine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; pytest-xdist keeps that order (--no-loadscope-reorder)."""
    places = {f"test_{name}": place for place, name in enumerate(_LONG, start=1)}
    items.sort(key=lambda item: 0 if shares_servers(item.nodeid) else places.get(item.path.stem, len(_LONG) + 1))


class ByFile(LoadFileScheduling):
    """A process runs whole files, and one process all that share servers."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "servers" if shares_servers(file) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile | None:
    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def random_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A random target with an EAGLE-1 and an EAGLE-3 head."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "target": models.random_target(folder / "target"),
        "eagle": models.random_eagle1_head(folder / "eagle"),
        "eagle3": models.random_eagle3_head(folder / "eagle3"),
    }


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two servers of the shipped target in float32, plain and with trees, with so few cache blocks that requests are preempted."""
    options = (
        *("--num-gpu-blocks-override", "40"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        # The small model would fill all its tokens with the whitespace that JSON allows.
        *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
    )
    trees = (*options, *TREES, "--per-request-spec-decode-metrics", "detailed")
    with servers(tmp_path_factory.mktemp("servers"), options, trees) as (plain, with_trees):
        yield Pair(plain, with_trees)
