"""How honest the head's confidence is: the probability that a drafted node is accepted, learned from what was verified.

The budget (budget.py) lives on it. numpy only.
"""

import numpy as np


class Calibration:
    """The probability that a drafted node is accepted, from the score that the head gave its path.

    The score is the sum of log confidences. Nodes are counted in buckets of scores; old counts fade. Until a bucket has seen
    enough, the confidence itself counts. The result never falls as the score rises, so the most probable nodes always form trees.

    Texts change, and buckets follow slowly; a bucket that is believed to be hopeless is not even verified. So all probabilities
    fall together as soon as fewer nodes are accepted than they promise (`drift`). While nothing is drafted that is forgiven, and in
    time the buckets' counts are forgotten: then drafts are tried again.
    """

    _EDGES = np.array([-7, -5, -4, -3, -2.5, -2, -1.5, -1, -0.75, -0.5, -0.35, -0.2, -0.1, -0.06, -0.03, -0.01])
    _GRID = np.linspace(-8.0, 0.0, 161)
    _PRIOR = 20.0  # nodes that the head's own confidence stands for
    _HALF_LIFE = 4000.0  # nodes of a bucket
    _LATELY = 0.97  # weight of a pass's nodes one pass later, for `drift`
    _LATELY_PRIOR = 5.0  # accepted nodes
    _CHANCE = 1.1  # of `drift`, a factor that is put down to chance
    _FORGIVES, _AGES = 0.996, 0.9993  # what a pass without drafts leaves of `drift`'s counts, and of the buckets'

    def __init__(self) -> None:
        middles = (self._EDGES[1:] + self._EDGES[:-1]) / 2
        self._centers = np.concatenate([[1.3 * self._EDGES[0]], middles, [self._EDGES[-1] / 2]])
        self._verified = np.zeros(len(self._centers))
        self._accepted = np.zeros(len(self._centers))
        self._found = np.exp(self._centers)  # probabilities of nodes with scores like `_centers`
        self._lately = np.zeros(2)  # nodes accepted, and to be expected, in the last passes
        self.drift = 1.0  # how many times as probable as learned nodes are at present; at most 1

    def update(self, scores: np.ndarray, accepted: np.ndarray) -> None:
        """Count verified nodes: scores [n] and whether each was accepted [n]."""
        self._lately = self._LATELY * self._lately + [accepted.sum(), self.lasting(scores).sum()]
        buckets = np.searchsorted(self._EDGES, scores, side="right")  # ascending, as the centers are
        verified = np.bincount(buckets, minlength=len(self._centers))
        fade = 0.5 ** (verified / self._HALF_LIFE)
        self._verified = self._verified * fade + verified
        self._accepted = self._accepted * fade + np.bincount(buckets, weights=accepted, minlength=len(self._centers))
        self._find()

    def saw_none(self) -> None:
        """Nothing was drafted for a pass."""
        self._lately *= self._FORGIVES
        self._verified *= self._AGES
        self._accepted *= self._AGES
        self._find()

    def _find(self) -> None:
        prior = self._PRIOR * np.exp(self._centers)
        self._found = np.maximum.accumulate((self._accepted + prior) / (self._verified + self._PRIOR))
        accepted, expected = (self._lately + self._LATELY_PRIOR).tolist()
        self.drift = min(self._CHANCE * accepted / expected, 1.0)

    def score_of(self, probability: float) -> float:
        """The lowest score, on a grid, of nodes that are at least so probable; 0 if none is, minus infinity if all are."""
        place = int(np.searchsorted(self(self._GRID), probability))
        if place == 0:
            return float("-inf")
        return float(self._GRID[place]) if place < len(self._GRID) else 0.0

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Probabilities, at present, of nodes with these scores; minus infinity gives 0."""
        return np.minimum(self.drift * self.lasting(scores), 1.0)

    def lasting(self, scores: np.ndarray) -> np.ndarray:
        """Likewise, as learned in the long run."""
        known = np.interp(scores, self._centers, self._found)
        # Further down the confidence says how fast it goes on.
        return known * np.exp(np.minimum(scores - self._centers[0], 0.0))
