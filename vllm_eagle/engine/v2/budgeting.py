"""The budget (vllm_eagle/budget/) fed with what arrives late, a step or two after it happened. On the first rank alone.

What is verified, what was drafted and what passes took come as copies and times that nobody waits for (late.py). The plan goes out
through the scheduler (drafts.py). Whatever is planned, the emitted tokens are the same.
"""

import math
from collections.abc import Sequence

import numpy as np

from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.algorithm.tree import inner_nodes
from vllm_eagle.budget.budget import Budget, Plan
from vllm_eagle.engine.v2.drafts import Drafts


class Budgeting:
    """Of one engine."""

    def __init__(self, budget: Budget, config: TreeConfig, splits: bool):
        """`splits`: whether a batch's drafts are split between requests by score (split.py); else all have as many."""
        self._budget, self._splits, self._depth_limit = budget, splits, config.depth_limit
        self._num_draft_tokens, self._children = config.num_draft_tokens, config.children
        self._plan = Plan(0)
        self._per_request = float(
            config.num_draft_tokens
        )  # nodes that were worth their place, of the trees that were last looked at

    def verified(self, num_nodes: np.ndarray, paths: np.ndarray, scores: np.ndarray) -> None:
        """Trees with so many nodes [num_reqs], roots included, were scored; paths [num_reqs, max_depth] were accepted of them."""
        places = np.arange(scores.shape[1])
        is_node = (places > 0) & (places < num_nodes[:, None])
        accepted = np.zeros_like(is_node)
        np.put_along_axis(accepted, paths.astype(np.int64), True, axis=1)  # zeros behind a path's end are the root
        if is_node.any():
            self._budget.calibration.update(scores[is_node], accepted[is_node])

    def drafted(self, depth: int, num_nodes: np.ndarray, scores: np.ndarray, depths: np.ndarray, parents: np.ndarray) -> None:
        """So many levels were drafted for the requests that decode: their trees, [num_reqs, max_nodes] each."""
        inner = inner_nodes(parents, depths, num_nodes, self._depth_limit)
        self._budget.profile.saw_trees(inner / len(num_nodes), depth)
        own = [slice(1, int(number)) for number in num_nodes]
        counts = self._budget.keep(
            [row[part] for row, part in zip(scores, own, strict=True)],
            [row[part] for row, part in zip(depths, own, strict=True)],
            depth,
            len(num_nodes),
        )
        self._per_request = sum(counts) / max(1, len(counts))

    def passed(self, gap_s: float | None, pass_s: float, num_tokens: int, num_prompt_tokens: int, num_trees: int) -> None:
        """A step's pass over so many tokens took `pass_s`, after a gap; None: the engine may have had nothing to do."""
        if gap_s is not None:
            self._budget.costs.saw_gap(gap_s)
        self._budget.costs.saw_prompts(num_prompt_tokens)
        if not num_prompt_tokens:
            self._budget.saw_pass(pass_s, num_tokens, num_trees)

    def spent(self, first_s: float, num_tokens: int, levels_s: float, num_reqs: int, level_rows: Sequence[int], depth: int) -> None:
        """Drafting took so long: its first pass over so many tokens, and its levels over so many nodes each."""
        self._budget.costs.saw_drafting(first_s, num_tokens, levels_s, num_reqs, level_rows, depth)

    def plan(self, num_decoding: int) -> Drafts:
        """For the steps to come, with so many requests that decode."""
        self._plan = self._budget.plan(max(1, num_decoding))
        if self._plan.depth == 0:
            return Drafts(0, 0, None, self._per_request)  # of what is drafted already, the best
        # Some have more than the others; and what is scheduled bounds how fast trees may grow again.
        most = math.ceil(2 * self._per_request) + 2 if self._splits else max(1, math.ceil(self._per_request))
        widths = tuple(self._budget.profile.widths(self._children))
        return Drafts(min(self._num_draft_tokens, most), self._plan.depth, widths, self._per_request)
