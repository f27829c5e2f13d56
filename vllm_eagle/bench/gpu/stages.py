"""The parts of `vllm-eagle gpu-check` in the order of their importance, as many of them as fit into the time that there is.

What was done is named in the result, so that another call goes on from there; so is what did not fit.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stage:
    """A part.

    Attributes:
        least_s: seconds without which it is not begun; not measured on a GPU, so guesses.
        run: puts into the result what it finds, with so many seconds at the most; yields whenever there is something new, and once
            more if it was cut short, with the reason.
    """

    name: str
    least_s: float
    run: Callable[[Result, float], Iterator[str | None]]


class Clock:
    """Time that is left."""

    def __init__(self, minutes: float | None, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._end_s = float("inf") if minutes is None else now() + 60 * minutes

    @property
    def left_s(self) -> float:
        """Seconds."""
        return self._end_s - self._now()


def run(stages: Iterable[Stage], result: Result, clock: Clock) -> Iterator[None]:
    """Fill `result`; yields after whatever is new. `done` holds the names of complete stages, which are not run again."""
    done, left_out = result.setdefault("done", []), result.setdefault("left_out", {})
    for stage in stages:
        if stage.name in done:
            continue
        if clock.left_s < stage.least_s:
            left_out[stage.name] = f"{max(clock.left_s, 0):.0f} seconds were left of at least {stage.least_s:.0f}"
            continue
        began_s, cut_short = clock.left_s, None
        left_out[stage.name] = "began, did not end"
        for reason in stage.run(result, clock.left_s):
            cut_short = reason
            yield
        result.setdefault("seconds", {})[stage.name] = None if began_s == float("inf") else round(began_s - clock.left_s)
        if cut_short is None:
            done.append(stage.name)
            del left_out[stage.name]
        else:
            left_out[stage.name] = cut_short
        yield
