"""What a pass costs by the tokens in it: measured at start, followed while passes are timed. numpy only."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_KEPT = 0.999  # of what is uncertain, after another pass: what is not seen for long is not entirely forgotten
REMEMBERED = 0.999  # of what drafts cost, after a pass without any: it may be out of date, and then they are to be tried again
_NOISE = 0.1  # of a pass, that says nothing about the next one
_OUTLIER = 2.0  # a pass that took this many times what was expected was disturbed, and counts as if it took this much
_LEAST = 0.01  # of what was measured at start


@dataclass(frozen=True, slots=True)
class _Spread:
    """Standard deviations of what costs may be beside what they are believed to be."""

    together: float  # of all alike, as a share: other processes on the same cores, a clock that changes
    alone: float  # of a single point, likewise
    added: float  # of what every pass takes whatever its size, as a share of the smallest pass
    drafts: float  # of what a pass with drafts takes besides, likewise
    tree: float  # of what each tree in it takes besides, likewise

    def add_to(self, covariance: np.ndarray, points: np.ndarray) -> None:
        """To that of the points and of the two costs of drafts: [len(points) + 2, len(points) + 2]."""
        own = covariance[:-2, :-2]
        own += np.multiply.outer(self.together**2 * points, points) + (self.added * points[0]) ** 2
        np.einsum("ii->i", own)[:] += (self.alone * points) ** 2
        covariance[-2, -2] += (self.drafts * points[0]) ** 2
        covariance[-1, -1] += (self.tree * points[0]) ** 2


_AT_START = _Spread(0.05, 0.02, 0.5, 0.1, 0.005)  # what was measured then is without attention, sampling and much of Python
_PER_PASS = _Spread(0.02, 0.002, 0.005, 0.003, 0.0003)


class CostCurve:
    """Seconds of a pass over so many tokens: straight lines between points, and what drafts among the tokens take besides.

    A Kalman filter over the points. What makes it useful is how their changes belong together: mostly all costs rise or fall by the
    same share, sometimes by the same seconds (attention, sampling, Python), rarely one alone. So a pass of one size corrects the
    sizes that are not met, and how small and large passes compare is learned only from passes of both kinds.

    No pass is believed to cost less than one with fewer tokens.
    """

    def __init__(self, tokens: Sequence[int], seconds: Sequence[float]):
        """From measurements at increasing numbers of tokens.

        Raises:
            ValueError: there are none, the numbers do not increase, or a time is not positive.
        """
        self._tokens = np.asarray(tokens, np.float64)
        measured = np.asarray(seconds, np.float64)
        if len(self._tokens) == 0 or len(self._tokens) != len(measured):
            raise ValueError(f"a cost curve needs as many times as numbers of tokens, got {len(tokens)} and {len(seconds)}")
        if (np.diff(self._tokens) <= 0).any() or (measured <= 0).any():
            raise ValueError("a cost curve needs increasing numbers of tokens and positive times")
        measured = np.minimum.accumulate(measured[::-1])[::-1]  # what disturbs a measurement makes it slower
        self._state = np.append(measured, [0.0, 0.0])  # seconds of each point, what drafts take besides, and each tree of them
        self._least = np.append(_LEAST * measured, [0.0, 0.0])
        self._covariance = np.zeros((len(self._state), len(self._state)))
        _AT_START.add_to(self._covariance, measured)

    @property
    def points(self) -> list[tuple[int, float]]:
        """Tokens and seconds, as of now."""
        return list(zip(self._tokens.astype(int).tolist(), self._believed().tolist(), strict=True))

    def __str__(self) -> str:
        """Milliseconds by tokens."""
        return ", ".join(f"{tokens}: {1e3 * seconds:.1f}" for tokens, seconds in self.points)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Seconds without drafts; beyond the last point the last slope goes on."""
        tokens = np.asarray(tokens, np.float64)
        seconds = self._believed()
        inside = np.interp(tokens, self._tokens, seconds)
        if len(seconds) < 2:
            return inside * np.maximum(tokens / self._tokens[0], 1.0)
        slope = (seconds[-1] - seconds[-2]) / (self._tokens[-1] - self._tokens[-2])
        return inside + np.maximum(tokens - self._tokens[-1], 0.0) * slope

    def drafts_s(self, num_trees: np.ndarray) -> np.ndarray:
        """Seconds that a pass with so many trees takes longer than one of as many tokens without: their attention, the walk."""
        return (num_trees > 0) * self._state[-2] + num_trees * self._state[-1]

    def correct(self, tokens: float, seconds: float, num_trees: int = 0) -> None:
        """A pass over `tokens`, with so many draft trees among them, took `seconds`."""
        if seconds <= 0:
            return  # the clock was set back
        if not num_trees:
            self._state[-2:] *= REMEMBERED
        self._covariance *= _KEPT
        _PER_PASS.add_to(self._covariance, self._state[:-2])
        seen = np.append(self._weights(tokens), [float(num_trees > 0), float(num_trees)])
        expected = max(float(seen @ self._state), float(self._least[0]))
        error = min(max(seconds, expected / _OUTLIER), expected * _OUTLIER) - expected
        shared = self._covariance @ seen
        gain = shared / (seen @ shared + (_NOISE * expected) ** 2)
        self._state = np.maximum(self._state + gain * error, self._least)
        self._covariance -= np.multiply.outer(gain, shared)

    def _believed(self) -> np.ndarray:
        return np.maximum.accumulate(self._state[:-2])

    def _weights(self, tokens: float) -> np.ndarray:
        """Of the points, on a straight line through the two around or before: their sum is 1."""
        weights = np.zeros(len(self._tokens))
        right = min(max(int(self._tokens.searchsorted(tokens)), 1), len(self._tokens) - 1)
        left = max(right - 1, 0)
        span = float(self._tokens[right] - self._tokens[left])
        weights[right] = max(float(tokens - self._tokens[left]) / span, 0.0) if span else 1.0
        weights[left] += 1 - weights[right]
        return weights
