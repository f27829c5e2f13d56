"""The counters of the last minutes, one sample a second, and what happened between two of them."""

from collections import deque

from vllm_eagle.metrics.counters import TreeMetrics

KEPT_S = 600
FEW_TREES = 5  # verifications whose mean says nothing


class History:
    """Samples, oldest first. Times are seconds of any clock that only goes forward."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, TreeMetrics]] = deque()

    def add(self, now_s: float, metrics: TreeMetrics) -> None:
        """Keep a sample, and drop what is too old; the newest one of those stays, as the start of the oldest span."""
        self._samples.append((now_s, metrics))
        while len(self._samples) > 2 and self._samples[1][0] <= now_s - KEPT_S:
            self._samples.popleft()

    def last(self, seconds: float) -> tuple[TreeMetrics, float]:
        """What was counted in the last `seconds`, or since the first sample, and how long that was."""
        if not self._samples:
            return TreeMetrics(), 0.0
        now_s, newest = self._samples[-1]
        before_s, before = next(sample for sample in self._samples if sample[0] >= now_s - seconds)
        return newest.since(before), now_s - before_s

    def taus(self, now_s: float, step_s: float) -> list[float | None]:
        """Tau of each span of `step_s`, oldest first, up to now; none where hardly a tree was verified or nobody looked."""
        found: list[float | None] = [None] * round(KEPT_S / step_s)
        newest = int(now_s // step_s)  # spans lie fixed in time, so that a point of a chart stays what it was
        ends: dict[int, TreeMetrics] = {}  # last sample of a span, by how many spans ago it was
        if self._samples:
            first_s, first = self._samples[0]
            ends[newest - int(first_s // step_s) + 1] = first  # the oldest span starts there
        for sample_s, metrics in self._samples:
            ends[newest - int(sample_s // step_s)] = metrics
        for ago, metrics in ends.items():
            if ago + 1 in ends and 0 <= ago < len(found):
                between = metrics.since(ends[ago + 1])
                if between.counts["num_verifications"] >= FEW_TREES:
                    found[-1 - ago] = round(between.tau, 3)
        return found
