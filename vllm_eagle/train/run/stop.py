"""SIGTERM, with which clusters end a job, and SIGINT: a run saves the step that it is at before it ends."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT)


class StoppedError(BaseException):
    """A signal has ended the run, as KeyboardInterrupt does; `step` is the one that was saved for it, if any."""

    def __init__(self, number: int, step: int | None = None):
        super().__init__(signal.Signals(number).name)
        self.number, self.step = number, step


@contextmanager
def raised() -> Iterator[None]:
    """In this block a signal raises StoppedError."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise StoppedError(number)

    with _handled_by(stop):
        yield


class Noted:
    """The first signal that came, for whoever looks after each step; another SIGINT does not wait for that."""

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def here(self) -> Iterator[None]:
        """In this block."""
        with _handled_by(self._note):
            yield

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise StoppedError(number)
        self.number = self.number or number


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return
    before = {number: signal.signal(number, handler) for number in ENDING}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
