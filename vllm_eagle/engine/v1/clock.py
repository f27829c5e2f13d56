"""How long the parts of a step of the V1 engine took, for the budget."""

import time

from vllm_eagle.metrics.counters import STAGES, TreeMetrics

_PASS = [STAGES.index(stage) for stage in ("verify", "accept", "compact")]
_DRAFT = STAGES.index("draft")


class StepClock:
    """How long the parts of a step took, for the budget."""

    def __init__(self, metrics: TreeMetrics):
        self._seconds = metrics.counts["stage_seconds"]
        self._now = self._then = self._seconds.copy()
        self._ended_s: float | None = None
        self._paused_s = 0.0
        self._gap_s = 0.0

    def start_step(self) -> None:
        """The engine begins a step; the last one ended with its drafting, unless it had nothing to run."""
        if self._ended_s is None:
            self._gap_s = 0.0
        else:
            self._gap_s, self._ended_s = time.perf_counter() - self._ended_s, None
            self._then = self._now
        self._now = self._seconds.copy()

    def pause(self) -> None:
        """The step's tokens are handed over; drafting comes when they have been sent."""
        self._paused_s = time.perf_counter()

    def resume(self) -> None:
        """Drafting begins."""
        self._gap_s += time.perf_counter() - self._paused_s

    def end_step(self) -> None:
        """Drafting is done."""
        self._ended_s = time.perf_counter()

    def read(self) -> list[float]:
        """Seconds outside of steps since the last one's drafting, of this step's pass, and of the last step's drafting."""
        spent = self._seconds - self._now
        return [self._gap_s, float(spent[_PASS].sum()), float((self._now - self._then)[_DRAFT])]
