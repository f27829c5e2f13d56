"""An engine in a process of its own takes no time from others between its turns, and ends with whoever started it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from vllm_eagle.bench.speed import apart
from vllm_eagle.bench.speed.sustained import Ask


def start(model: str, arguments: dict[str, Any]) -> int:
    """In place of an engine's start."""
    return os.getpid()


def answer(asks: list[Ask], at_once: int) -> Any:
    """In place of an engine's answers: what its process is doing."""
    return psutil.Process().status()


def without_engine(set_: Callable[[Any, str, Any], None] = setattr) -> Any:
    set_(apart, "_start", start)
    set_(apart, "_answer", answer)
    return apart.engine_apart("model", {})


def has_ended(number: int) -> bool:
    try:
        return bool(psutil.Process(number).status() == psutil.STATUS_ZOMBIE)  # a container's first process may not ask for it
    except psutil.NoSuchProcess:
        return True


def wait_for(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_it_is_stopped_between_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    with without_engine(monkeypatch.setattr) as (ask, number):
        process = psutil.Process(number)
        for _ in range(3):
            assert wait_for(lambda: process.status() == psutil.STATUS_STOPPED)
            assert ask([], 1) != psutil.STATUS_STOPPED
    assert not process.is_running()


def test_it_ends_with_whoever_started_it() -> None:
    """Though it is stopped, and nobody asks it to."""
    code = "from tests.bench.test_apart import *\nwith without_engine() as (_, number): print(number, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        number = int(caller.stdout.readline())
        assert wait_for(lambda: psutil.Process(number).status() == psutil.STATUS_STOPPED)
        caller.send_signal(signal.SIGKILL)
    assert wait_for(lambda: has_ended(number))
