"""How honest the head's confidence is: the probability that a drafted node is accepted, learned from what was verified.

The budget (budget.py) lives on it. numpy only.
"""

import numpy as np


class Calibration:
    """The probability that a drafted node is accepted, from the score that the head gave its path.

    The score is the sum of log confidences. Nodes are counted in buckets of scores; old counts fade. Until a bucket has seen
    enough, the confidence itself counts. The result never falls as the score rises, so the most probable nodes always form trees.
    """

    _EDGES = np.array([-7, -5, -4, -3, -2.5, -2, -1.5, -1, -0.75, -0.5, -0.35, -0.2, -0.1, -0.06, -0.03, -0.01])
    _GRID = np.linspace(-8.0, 0.0, 161)
    _PRIOR = 20.0  # nodes that the head's own confidence stands for
    _HALF_LIFE = 4000.0  # nodes of a bucket

    def __init__(self) -> None:
        middles = (self._EDGES[1:] + self._EDGES[:-1]) / 2
        self._centers = np.concatenate([[1.3 * self._EDGES[0]], middles, [self._EDGES[-1] / 2]])
        self._verified = np.zeros(len(self._centers))
        self._accepted = np.zeros(len(self._centers))
        self._found = np.exp(self._centers)  # probabilities of nodes with scores like `_centers`

    def update(self, scores: np.ndarray, accepted: np.ndarray) -> None:
        """Count verified nodes: scores [n] and whether each was accepted [n]."""
        buckets = np.searchsorted(self._EDGES, scores, side="right")  # ascending, as the centers are
        verified = np.bincount(buckets, minlength=len(self._centers))
        fade = 0.5 ** (verified / self._HALF_LIFE)
        self._verified = self._verified * fade + verified
        self._accepted = self._accepted * fade + np.bincount(buckets, weights=accepted, minlength=len(self._centers))
        prior = self._PRIOR * np.exp(self._centers)
        self._found = np.maximum.accumulate((self._accepted + prior) / (self._verified + self._PRIOR))

    def score_of(self, probability: float) -> float:
        """The lowest score, on a grid, of nodes that are at least so probable; 0 if none is, minus infinity if all are."""
        place = int(np.searchsorted(self(self._GRID), probability))
        if place == 0:
            return float("-inf")
        return float(self._GRID[place]) if place < len(self._GRID) else 0.0

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Probabilities of nodes with these scores; minus infinity gives 0."""
        known = np.interp(scores, self._centers, self._found)
        # Further down the confidence says how fast it goes on.
        return known * np.exp(np.minimum(scores - self._centers[0], 0.0))
