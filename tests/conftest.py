import os

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

import pytest
from hypothesis import settings

from tests import models
from tests.serving.server import TREES, Pair, servers

settings.register_profile("project", deadline=None, max_examples=60)
settings.load_profile("project")


# Files that take minutes, those with the longest first: left to the end, one process would run them while the others are done.
_LONG = ("server_faults", "exactness", "examples_serve", "ray", "soak", "throughput", "train", "replay", "engine", "combine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; pytest-xdist keeps that order (--no-loadscope-reorder)."""
    places = {f"test_{name}": place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(_LONG)))


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
