"""What a step costs beside what it yields: passes of the target and of the head, and what lies between them. numpy only.

Measured at start, then followed with every step that is timed.
"""

from collections.abc import Sequence

import numpy as np

from vllm_eagle.budget.cost_curve import REMEMBERED, CostCurve

_STEP = 0.1  # how fast what is spent beside passes is followed
_FADE = 0.05  # likewise, what lies between steps, and how wide and how many levels are
_OUTLIER = 2.0  # what took this many times what was expected was disturbed, and counts as if it took this much
_PROMPT_FADE = 0.02  # how fast it is noticed that prompts come more often, or less
_FEW_PROMPTS = 1e-3  # of passes; they change nothing


class Costs:
    """Seconds of the parts of a step of one engine."""

    def __init__(
        self,
        target: CostCurve,
        head: CostCurve,  # with logits of every token
        depth_limit: int,
        committed: CostCurve | None = None,  # the head without logits, as it runs over committed tokens; None: no different
    ):
        self.target, self.head, self.committed = target, head, committed or head
        self.first_s = 0.0  # of drafting, what is spent beside the head's passes, however few levels are drafted
        self.outside_s = 0.0  # of a step: scheduler, sampling's bookkeeping, transport
        self._rows = np.ones(depth_limit)  # [depth] rows per request of the head's pass over nodes of this depth
        self._runs = np.ones(depth_limit)  # [depth] how often there is such a pass where drafting may go so deep
        self._prompt_share, self._prompt_tokens = 0.0, 0.0  # of passes that hold prompts, and how much of them these hold

    def decoding_s(self, tokens: np.ndarray) -> np.ndarray:
        """Seconds that so many tokens of decoding take: a pass, or, beside a prompt, what they add to it.

        The prompt is computed anyway. Beside it there is no waiting for weights that more tokens could share, so drafts cost as
        much as tokens that are sure: where prompts come often, fewer drafts pay.
        """
        if self._prompt_share < _FEW_PROMPTS:
            return self.target(tokens)
        beside_s = self.target(self._prompt_tokens + tokens) - self.target(np.array(self._prompt_tokens))
        return (1 - self._prompt_share) * self.target(tokens) + self._prompt_share * beside_s

    def levels_s(self, num_requests: float) -> np.ndarray:
        """Seconds of the head's passes over levels, where 1, 2, ... are drafted: [depth_limit]. The first one needs none."""
        runs = np.minimum.accumulate(self._runs)[1:]  # no level without the one above
        return np.append(0.0, (runs * self.head(num_requests * self._rows[1:])).cumsum())

    def saw_pass(self, seconds: float, num_tokens: int, num_trees: int) -> None:
        """A target pass over so many tokens, without prompts, took `seconds`; so many requests had drafts in it."""
        if not num_trees:
            self.first_s *= REMEMBERED
        self.target.correct(num_tokens, seconds, num_trees)

    def saw_drafting(
        self, first_s: float, first_rows: int, levels_s: float, num_requests: int, rows: Sequence[int], depth: int
    ) -> None:
        """Drafting for some requests took `first_s` up to the first level, in which the head ran over `first_rows` committed
        tokens, then `levels_s`, in which it ran over `rows` nodes, level by level; `depth` levels were allowed.
        """
        head_s = float(self.committed(np.array(first_rows)))
        self.first_s += _STEP * (min(max(first_s - head_s, 0.0), _OUTLIER * (self.first_s + head_s)) - self.first_s)
        self._runs[1:depth] += _FADE * ((np.arange(1, depth) <= len(rows)) - self._runs[1:depth])
        if not rows or levels_s <= 0:
            return
        expected = self.head(np.array(rows))
        mean = sum(rows) / len(rows)  # levels of one drafting are measured together
        self.head.correct(mean, float(self.head(np.array(mean)) * levels_s / expected.sum()))
        levels = min(len(rows), len(self._rows) - 1)
        self._rows[1 : levels + 1] += _FADE * (np.array(rows[:levels]) / num_requests - self._rows[1 : levels + 1])

    def saw_gap(self, seconds: float) -> None:
        """Between the end of a step and the start of the next one lay `seconds`."""
        self.outside_s += _FADE * (min(seconds, _OUTLIER * max(self.outside_s, 1e-3)) - self.outside_s)

    def saw_prompts(self, num_tokens: int) -> None:
        """A target pass held so many tokens of prompts, or none."""
        self._prompt_share += _PROMPT_FADE * ((num_tokens > 0) - self._prompt_share)
        if num_tokens:
            self._prompt_tokens += (_STEP if self._prompt_tokens else 1.0) * (num_tokens - self._prompt_tokens)
