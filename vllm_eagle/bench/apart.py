"""An offline engine in a process of its own, whole: scheduler and worker in one, so that nothing polls.

vLLM's usual offline engine has a process for the scheduler that polls the worker's, and so takes a core from it. With
VLLM_ENABLE_V1_MULTIPROCESSING=0 both run in the caller; a process per engine keeps several of them alive side by side.
"""

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from vllm_eagle.bench import sustained
from vllm_eagle.bench.offline import Generated, engine
from vllm_eagle.bench.sustained import Answer, Ask

_stack = ExitStack()
_engines: list[Any] = []  # of this process: one


@contextmanager
def engine_apart(model: str, arguments: dict[str, Any]) -> Iterator[tuple[Answer, int]]:
    """How to ask the engine, and the number of its process.

    Raises:
        Exception: whatever the engine raises, at its start or when asked.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_end_with_parent) as process:
        number = process.submit(_start, model, arguments).result()
        try:
            yield partial(_ask, process), number
        finally:
            process.submit(_stack.close).result()


def _end_with_parent() -> None:
    """Should the caller be killed, its engines end, too."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _ask(process: ProcessPoolExecutor, asks: Sequence[Ask], at_once: int) -> Generated:
    return process.submit(_answer, asks, at_once).result()


def _start(model: str, arguments: dict[str, Any]) -> int:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    _engines.append(_stack.enter_context(engine(model, **arguments)))
    return os.getpid()


def _answer(asks: Sequence[Ask], at_once: int) -> Generated:
    return sustained.offline(_engines[0], asks, at_once)
