"""An offline engine in a process of its own, whole: scheduler and worker in one, so that nothing polls.

vLLM's usual offline engine has a process for the scheduler that polls the worker's, and so takes a core from it. With
VLLM_ENABLE_V1_MULTIPROCESSING=0 both run in the caller; a process per engine keeps several of them alive side by side. Even so an
engine without work has dozens of threads that wake up now and then, and each time the threads of the one at work may wait for one
another: between its turns an engine is stopped.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

from vllm_eagle.bench.engines.mended import mend_sampled_chains
from vllm_eagle.bench.engines.offline import Generated, engine
from vllm_eagle.bench.speed import sustained
from vllm_eagle.bench.speed.sustained import Answer, Ask

_PR_SET_PDEATHSIG = 1  # prctl(2)
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
            _signal(number, signal.SIGSTOP)
            yield partial(_ask, process, number), number
        finally:
            _signal(number, signal.SIGCONT)
            process.submit(_stack.close).result()


def _end_with_parent() -> None:
    """Should the caller be killed, its engines end, too, even stopped ones. Only Linux has that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _signal(number: int, which: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it has died; its answer will say so
        os.kill(number, which)


def _ask(process: ProcessPoolExecutor, number: int, asks: Sequence[Ask], at_once: int) -> Generated:
    _signal(number, signal.SIGCONT)
    try:
        return process.submit(_answer, asks, at_once).result()
    finally:
        _signal(number, signal.SIGSTOP)


def _start(model: str, arguments: dict[str, Any]) -> int:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    mend_sampled_chains()
    _engines.append(_stack.enter_context(engine(model, **arguments)))
    return os.getpid()


def _answer(asks: Sequence[Ask], at_once: int) -> Generated:
    return sustained.offline(_engines[0], asks, at_once)
