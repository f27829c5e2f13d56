"""The sides that `vllm-eagle bench` compares: an offline engine or a server each, how to ask it, and what memory it holds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil  # type: ignore[import-untyped]

from vllm_eagle.bench.engines.drafters import flags
from vllm_eagle.bench.speed import sustained
from vllm_eagle.bench.speed.apart import engine_apart
from vllm_eagle.bench.speed.sustained import Answer

Side = tuple[Answer, Callable[[], int]]  # how to ask it; bytes of host memory of its processes


@contextmanager
def engine_side(model: str, arguments: dict[str, Any]) -> Iterator[Side]:
    """An offline engine."""
    metrics = {} if arguments.keys().isdisjoint(("speculative_config", "spec_model")) else sustained.METRICS
    with engine_apart(model, arguments | metrics) as (answer, pid):
        yield answer, lambda: host_bytes(pid, with_children=False)


@contextmanager
def server_side(model: str, arguments: dict[str, Any]) -> Iterator[Side]:
    """A server."""
    from vllm_eagle.bench.engines.server import serve

    options = flags(arguments | {"served_model_name": "target", "disable_uvicorn_access_log": True})
    with TemporaryDirectory() as folder, serve(model, options, Path(folder, "log")) as (url, pid):
        yield partial(sustained.over_http, url, "target"), lambda: host_bytes(pid, with_children=True)


def host_bytes(pid: int, with_children: bool) -> int:
    """Resident memory; pages that processes share count in each. What has ended, before or while it is looked at, has none."""
    found = 0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [process, *(process.children(recursive=True) if with_children else [])]:
            with suppress(psutil.NoSuchProcess):  # a short-lived helper
                found += each.memory_info().rss
    return found


def device_bytes() -> int:
    """Memory of the GPU that is in use, whoever uses it; 0 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free)
