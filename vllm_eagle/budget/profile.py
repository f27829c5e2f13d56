"""How probable the nodes of the last trees were: what drafting 1, 2, ... levels is likely to yield. numpy only."""

import numpy as np

_FADE = 0.05  # how fast the profile follows the last trees
_PROBE_FADE = 0.2  # how fast it follows looks at what is not chosen, which are rare
_PER_NODE = 4  # cells of the profile; one request in four may have a node


class Profile:
    """Of the trees of one engine, by the depth that they were drafted to."""

    def __init__(self, num_draft_tokens: int, depth_limit: int):
        # [depth - 1, i] probability of the i-th best nodes of all requests together, of those not deeper than `depth`; a cell for
        # every _PER_NODE-th part of a node per request. Hopeful at first.
        cells = np.arange(num_draft_tokens).repeat(_PER_NODE)
        self._best = np.stack([np.where(cells < 2 * depth, 0.7 ** (cells + 1.0), 0.0) for depth in range(1, depth_limit + 1)])
        self._seen = np.zeros(depth_limit)  # [depth - 1] how often trees of that depth were seen
        self._deepest = np.zeros(depth_limit)  # [depth - 1] mean probability of a request's best node of exactly this depth
        self._inner = np.full(depth_limit, float(num_draft_tokens))  # [depth - 1] nodes per request of that depth with children
        self._num_draft_tokens = num_draft_tokens

    @property
    def nodes(self) -> np.ndarray:
        """Nodes per request, [num_cells + 1], from 0: what `accepted` counts by."""
        return np.arange(self._best.shape[1] + 1) / _PER_NODE

    def accepted(self, drift: float) -> np.ndarray:
        """Nodes of a request that are likely to be accepted, of its best 0, ..., in trees of 1, 2, ... levels.

        [depth_limit, num_cells + 1] float. `drift`: how many times as probable as learned nodes are at present. Levels never
        drafted add a node each, less probable than the last one as that is than its parent.
        """
        profile = self._best.copy()
        drafted = int((self._seen > 0).sum())
        if 0 < drafted < len(profile):
            before = self._deepest[drafted - 2] if drafted > 1 else 1.0
            factor = min(self._deepest[drafted - 1] / max(before, 1e-9), 1.0)  # means of different trees
            for depth in range(drafted, len(profile)):
                node = self._deepest[drafted - 1] * factor ** (depth - drafted + 1)
                profile[depth] = -np.sort(-np.append(profile[depth - 1], [node] * _PER_NODE))[:-_PER_NODE]
        expected = np.minimum(drift * np.maximum.accumulate(profile, axis=0), 1.0)  # a level more is never worse
        return np.concatenate([np.zeros((len(profile), 1)), expected.cumsum(1) / _PER_NODE], 1)

    def is_new(self, depth: int) -> bool:
        """Whether every tree of that depth still counts for much."""
        return bool(self._seen[depth - 1] < 1 / _FADE)

    def learn(self, probabilities: np.ndarray, levels: np.ndarray, drafted_depth: int, is_probe: bool) -> None:
        """From trees of that depth: their nodes' probabilities, 0 where there is no node, and depths; [num_trees, most] each."""
        few, num_trees = slice(drafted_depth), len(probabilities)
        depths = np.arange(1, drafted_depth + 1)[:, None, None]
        pooled = -np.sort(-np.where(levels <= depths, probabilities, 0.0).reshape(drafted_depth, -1), axis=1)
        summed = np.pad(pooled.cumsum(1), ((0, 0), (1, 1)), mode="constant")
        summed[:, -1] = summed[:, -2]
        places = np.minimum(np.arange(self._best.shape[1] + 1) * num_trees / _PER_NODE, pooled.shape[1])
        whole = places.astype(np.int64)
        accepted = summed[:, whole] + (places - whole) * (summed[:, whole + 1] - summed[:, whole])
        best = np.diff(accepted, axis=1) * _PER_NODE / num_trees
        deepest = np.where(levels == depths, probabilities, 0.0).max(2).mean(1)
        fades = np.maximum(_PROBE_FADE if is_probe else _FADE, 1 / (1 + self._seen[few]))  # the first ones count in full
        self._best[few] += fades[:, None] * (best - self._best[few])
        self._deepest[few] += fades * (deepest - self._deepest[few])
        self._seen[few] += 1

    def saw_trees(self, inner: np.ndarray, drafted_depth: int) -> None:
        """Trees of that depth had so many nodes with children, per request, of depths 1, 2, ...; [depth_limit] float."""
        few = slice(drafted_depth - 1)  # nodes of the last level have none
        fade = np.where(self._inner[few] >= self._num_draft_tokens, 1.0, _FADE)  # the first one in full
        self._inner[few] += fade * (inner[few] - self._inner[few])

    def widths(self, most: int) -> list[int]:
        """How many nodes per request to expand at depth 1, 2, ..., where that is said before they are known: twice the useful."""
        return np.clip(np.ceil(2 * self._inner), 1, most).astype(int).tolist()
