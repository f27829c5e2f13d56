"""How many nodes to verify, how deep to draft, and whether to draft at all: what a pass costs against what it is likely to yield.

A node is worth its probability of being accepted; a pass costs T(tokens in it). All nodes of all requests compete in one pool: the
n most probable are kept for which `(requests + sum of their probabilities) / (T(requests + n) + seconds of drafting)` is largest,
which is the expected number of tokens per second. Sure requests get large trees, hopeless ones none; under load n falls to 0.

Numbers in, numbers out: no clock and no chance, so that ranks which are given the same numbers decide alike. numpy only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_eagle.budget.calibration import Calibration
from vllm_eagle.budget.cost_curve import REMEMBERED, CostCurve

_STEP = 0.1  # how fast what is spent beside passes is followed
_OUTLIER = 2.0  # what took this many times what was expected was disturbed, and counts as if it took this much


def best_number(
    probabilities: np.ndarray,
    num_requests: int,
    cost: Callable[[np.ndarray], np.ndarray],
    drafting_s: float = 0.0,
    drafts_s: np.ndarray | float = 0.0,
) -> tuple[int, float]:
    """How many nodes to verify, and the tokens per second to expect then.

    Args:
        probabilities: of all nodes of all requests to be accepted, [num_nodes], falling.
        num_requests: in the pass; each has one token that is no draft and emits one more than it accepts.
        cost: seconds of a target pass by tokens in it.
        drafting_s: what drafting cost; it is spent whatever is verified.
        drafts_s: what a pass with the first 1, 2, ... nodes takes besides, for their being drafts: [num_nodes].
    """
    num_nodes = np.arange(len(probabilities) + 1)
    expected = num_requests + np.concatenate([[0.0], np.cumsum(probabilities)])
    besides = np.concatenate([[0.0], np.broadcast_to(drafts_s, len(probabilities))])
    rates = expected / (cost(num_requests + num_nodes) + drafting_s + besides)
    best = int(rates.argmax())
    return best, float(rates[best])


@dataclass(frozen=True, slots=True)
class Plan:
    """What to draft in a step."""

    depth: int  # most levels; 0 is plain decoding
    most_requests: int | None = None  # that get a tree; None: all
    most_missed: float = float("inf")  # tokens of a request that the head has not seen; those with more get no tree
    node_floor: float = float("-inf")  # children of nodes with no higher score are not worth their place in the target's pass
    node_price: float = 0.0  # tokens that could be made in the time of a node's place in the target's pass ...
    level_price: float = 0.0  # ... and in that of the head's pass over another level of all requests


class Budget:
    """Decides for one engine. `plan` says what to draft before a step is drafted, `keep` what of it to verify."""

    _FADE = 0.05  # how fast the profile follows the last trees
    _PROMPT_FADE = 0.02  # how fast it is noticed that prompts come more often, or less
    _FEW_PROMPTS = 1e-3  # of passes; they change nothing
    _PER_NODE = 4  # cells of the profile; one request in four may have a node
    _LOOK_EVERY = 4  # steps between two looks at costs and profile, while the number of requests stays the same
    _PROBE_EVERY, _PROBE_AT_MOST = 32, 256  # steps between two looks at what is not chosen
    _PROBE_FADE = 0.2  # how fast the profile follows such looks, which are rare
    _PROBE_LEVELS = 2  # deeper than what is chosen
    _PROBE_SHARE = 8  # where nothing is drafted, one request in so many is looked at: a tree teaches as much, and costs less
    # Drafting must promise so much more than plain decoding; below it noise decides, and prompts in the passes. To begin costs the
    # head's pass over all that it has missed.
    _BEGIN_AT, _STAY_AT = 1.06, 1.03
    # Below this gain plain decoding is looked at, too: in turns with drafting at first, then every so many steps.
    _SMALL_GAIN, _TRIAL, _PLAIN_EVERY = 1.15, 32, 16
    _PLAIN_AT_LEAST_EVERY = 256  # whatever the gain: it may be wrong
    _PAYS_BACK_IN = 64  # steps, after which it must have paid that the head has caught up with a request

    def __init__(
        self,
        target: CostCurve,
        head: CostCurve,  # with logits of every token
        num_draft_tokens: int,
        depth_limit: int,
        committed: CostCurve | None = None,  # the head without logits, as it runs over committed tokens; None: no different
    ):
        self.target, self.head, self._committed = target, head, committed or head
        self.calibration = Calibration()
        self.first_s = 0.0  # of drafting, what is spent beside the head's passes, however few levels are drafted
        self.outside_s = 0.0  # of a step: scheduler, sampling's bookkeeping, transport
        self._depth_limit = depth_limit
        # [depth - 1, i] probability of the i-th best nodes of all requests together, of those not deeper than `depth`; a cell for
        # every _PER_NODE-th part of a node per request. Hopeful at first.
        cells = np.arange(num_draft_tokens).repeat(self._PER_NODE)
        self._profile = np.stack([np.where(cells < 2 * depth, 0.7 ** (cells + 1.0), 0.0) for depth in range(1, depth_limit + 1)])
        self._seen = np.zeros(depth_limit)  # [depth - 1] how often trees of that depth were seen
        self._deepest = np.zeros(depth_limit)  # [depth - 1] mean probability of a request's best node of exactly this depth
        self._rows = np.ones(depth_limit)  # [depth] rows per request of the head's pass over nodes of this depth
        self._runs = np.ones(depth_limit)  # [depth] how often there is such a pass where drafting may go so deep
        self._inner = np.full(depth_limit, float(num_draft_tokens))  # [depth - 1] nodes per request of that depth with children
        self._steps_since_probe, self._probe_every = 0, self._PROBE_EVERY
        self._prompt_share, self._prompt_tokens = 0.0, 0.0  # of passes that hold prompts, and how much of them these hold
        self._steps_since_plain, self._plain_for = 0, 0  # steps since nothing was drafted, and for how many requests that was
        self._share = 1.0  # of the requests that do draft where drafting is planned
        self._gain = 1.0  # how many times plain decoding's tokens per second drafting promises
        self._spell = 0  # steps since drafting began to pay
        self._last = 0
        self._steps, self._keeps, self._best, self._best_for = 0, 0, Plan(0), 0

    def plan(self, num_requests: int) -> Plan:
        """What to draft for so many requests. Now and then more than pays, to learn."""
        if num_requests != self._best_for or self._steps % self._LOOK_EVERY == 0:
            self._best, self._best_for = self._best_plan(num_requests), num_requests
        self._steps += 1
        best = self._best.depth
        self._spell = self._spell + 1 if best else 0
        self._steps_since_plain += 1
        if not best or self._look_at_plain(num_requests):
            self._steps_since_plain, self._plain_for = 0, num_requests
            self._share += self._FADE * (1 - self._share)  # others may come that can draft
            if best:
                return Plan(0)
        self._steps_since_probe += 1
        if best == self._depth_limit:
            self._steps_since_probe, self._probe_every = 0, self._PROBE_EVERY
        elif self._steps_since_probe >= self._probe_every:
            # What was learned again and again is asked less and less often.
            self._probe_every = min(2 * self._probe_every, self._PROBE_AT_MOST) if best == self._last else self._PROBE_EVERY
            self._steps_since_probe, self._last = 0, best
            some = None if best else -(-num_requests // self._PROBE_SHARE)
            return Plan(min(best + self._PROBE_LEVELS, self._depth_limit), some, self._best.most_missed)
        return self._best

    def _look_at_plain(self, num_requests: int) -> bool:
        """Whether, where drafting seems to pay, plain decoding should have a turn: its cost is known from the past alone."""
        if self._gain < self._SMALL_GAIN:
            return self._spell % (2 if self._spell < self._TRIAL else self._PLAIN_EVERY) == 1
        known = self._plain_for and 0.25 < num_requests / self._plain_for < 4
        return self._steps_since_plain >= (self._PLAIN_AT_LEAST_EVERY if known else self._PLAIN_EVERY)

    def _best_plan(self, num_requests: int) -> Plan:
        rates, numbers = self._outlook(num_requests)
        best = int(rates.argmax())
        self._gain = float(rates[best] / rates[0])
        if rates[best] < (self._STAY_AT if self._best.depth else self._BEGIN_AT) * rates[0]:
            return Plan(0)
        tokens = num_requests * np.array([1.0, 1.0 + self._PAYS_BACK_IN])
        head_token_s = float(np.diff(self._committed(tokens))[0]) / self._PAYS_BACK_IN  # of one token more of every request
        gained_s = (self._gain - 1) * num_requests / float(rates[best])  # by a step
        most_missed = self._PAYS_BACK_IN * gained_s / max(head_token_s, 1e-12)
        rows = num_requests * (1 + float(numbers[best]))
        row_s = float(np.diff(self._decoding_s(np.array([rows - num_requests, rows])))[0]) / num_requests
        node_price, level_price = float(rates[best]) * row_s, float(rates[best] * self.head(np.array(num_requests)))
        return Plan(best, None, most_missed, self.calibration.score_of(node_price), node_price, level_price)

    def pays(self, plan: Plan, scores: np.ndarray) -> bool:
        """Whether another level may pay after one with these scores: a child is at most as probable as its parent."""
        return float((self.calibration(scores) - plan.node_price).clip(min=0.0).sum()) >= plan.level_price

    def rates(self, num_requests: int) -> np.ndarray:
        """Tokens per second to expect of drafting 0, 1, ... levels, each with its best number of nodes: [depth_limit + 1]."""
        return self._outlook(num_requests)[0]

    def _outlook(self, num_requests: int) -> tuple[np.ndarray, np.ndarray]:
        """`rates`, and the best numbers of nodes per request."""
        drafting = self._share * num_requests
        levels_s = self._levels_s(drafting)
        nodes = np.arange(self._profile.shape[1] + 1) / self._PER_NODE
        drafts_s = self.target.drafts_s(drafting * np.minimum(nodes, 1.0))
        seconds = self._decoding_s(num_requests + drafting * nodes) + self.outside_s + drafts_s
        accepted = np.concatenate([np.zeros((self._depth_limit, 1)), self._expected().cumsum(1) / self._PER_NODE], 1)
        expected = num_requests + drafting * accepted
        # The head runs over what the target commits before it drafts.
        first_s = self.first_s + self._committed(drafting * (1 + accepted))
        drafted = expected / (seconds + first_s + levels_s[:, None])
        return np.append(num_requests / seconds[0], drafted.max(1)), np.append(0.0, nodes[drafted.argmax(1)])

    def keep(self, scores: Sequence[np.ndarray], depths: Sequence[np.ndarray], drafted_depth: int, num_requests: int) -> list[int]:
        """How many nodes of each tree to verify.

        Args:
            scores: per tree, of its nodes without the root, falling; float [num_nodes].
            depths: likewise, from 1; int [num_nodes].
            drafted_depth: how many levels were drafted.
            num_requests: in the coming pass, those without a tree included.
        """
        most = max(map(len, scores), default=0)
        if most == 0:
            return [0] * len(scores)
        padded, levels = np.full((len(scores), most), -np.inf), np.zeros((len(scores), most), np.int64)
        for i, (row, depth) in enumerate(zip(scores, depths, strict=True)):
            padded[i, : len(row)], levels[i, : len(row)] = row, depth
        probabilities = self.calibration(padded)
        is_probe = drafted_depth > self._best.depth
        self._keeps += 1
        if is_probe or self._seen[drafted_depth - 1] < 1 / self._FADE or self._keeps % self._LOOK_EVERY == 0:
            self._learn(self.calibration.lasting(padded), levels, drafted_depth, self._PROBE_FADE if is_probe else self._FADE)
        if not is_probe:
            self._share += _STEP * (len(scores) / num_requests - self._share)
        # A stable sort keeps a parent ahead of a child that is as probable.
        order = np.argsort(-probabilities, axis=None, kind="stable")
        order = order[np.isfinite(padded).ravel()[order]]
        drafting_s = float(self._committed(np.array(len(scores))) + self._levels_s(len(scores))[drafted_depth - 1])
        # A probe is to find out what drafts cost in the target's pass; if it believed that they do not pay, it never would.
        # The first column has the best node of each tree, with which it begins.
        drafts_s = 0.0 if is_probe else self.target.drafts_s((order % most == 0).cumsum())
        spent_s = self.outside_s + self.first_s + drafting_s
        number, _ = best_number(probabilities.ravel()[order], num_requests, self._decoding_s, spent_s, drafts_s)
        counts: list[int] = np.bincount(order[:number] // most, minlength=len(scores)).tolist()
        return counts

    def saw_trees(self, inner: np.ndarray, drafted_depth: int) -> None:
        """Trees of that depth had so many nodes with children, per request, of depths 1, 2, ...; [depth_limit] float."""
        few = slice(drafted_depth - 1)  # nodes of the last level have none
        fade = np.where(self._inner[few] >= self._profile.shape[1] / self._PER_NODE, 1.0, self._FADE)  # the first one in full
        self._inner[few] += fade * (inner[few] - self._inner[few])

    def widths(self, most: int) -> list[int]:
        """How many nodes per request to expand at depth 1, 2, ..., where that is said before they are known: twice the useful."""
        return np.clip(np.ceil(2 * self._inner), 1, most).astype(int).tolist()

    def saw_prompts(self, num_tokens: int) -> None:
        """A target pass held so many tokens of prompts, or none."""
        self._prompt_share += self._PROMPT_FADE * ((num_tokens > 0) - self._prompt_share)
        if num_tokens:
            self._prompt_tokens += (_STEP if self._prompt_tokens else 1.0) * (num_tokens - self._prompt_tokens)

    def _decoding_s(self, tokens: np.ndarray) -> np.ndarray:
        """Seconds that so many tokens of decoding take: a pass, or, beside a prompt, what they add to it.

        The prompt is computed anyway. Beside it there is no waiting for weights that more tokens could share, so drafts cost as
        much as tokens that are sure: where prompts come often, fewer drafts pay.
        """
        if self._prompt_share < self._FEW_PROMPTS:
            return self.target(tokens)
        beside_s = self.target(self._prompt_tokens + tokens) - self.target(np.array(self._prompt_tokens))
        return (1 - self._prompt_share) * self.target(tokens) + self._prompt_share * beside_s

    def saw_pass(self, seconds: float, num_tokens: int, num_trees: int) -> None:
        """A target pass over so many tokens, without prompts, took `seconds`; so many requests had drafts in it."""
        if not num_trees:
            self.calibration.saw_none()
            self.first_s *= REMEMBERED
        self.target.correct(num_tokens, seconds, num_trees)

    def saw_drafting(
        self, first_s: float, first_rows: int, levels_s: float, num_requests: int, rows: Sequence[int], depth: int
    ) -> None:
        """Drafting for some requests took `first_s` up to the first level, in which the head ran over `first_rows` committed
        tokens, then `levels_s`, in which it ran over `rows` nodes, level by level; `depth` levels were allowed.
        """
        head_s = float(self._committed(np.array(first_rows)))
        self.first_s += _STEP * (min(max(first_s - head_s, 0.0), _OUTLIER * (self.first_s + head_s)) - self.first_s)
        self._runs[1:depth] += self._FADE * ((np.arange(1, depth) <= len(rows)) - self._runs[1:depth])
        if not rows or levels_s <= 0:
            return
        expected = self.head(np.array(rows))
        mean = float(np.mean(rows))  # levels of one drafting are measured together
        self.head.correct(mean, float(self.head(np.array(mean)) * levels_s / expected.sum()))
        levels = min(len(rows), self._depth_limit - 1)
        self._rows[1 : levels + 1] += self._FADE * (np.array(rows[:levels]) / num_requests - self._rows[1 : levels + 1])

    def levels_share(self, first_rows: int, rows: Sequence[int]) -> float:
        """Of the seconds of drafting, what the passes over levels are likely to take, where only the whole can be measured."""
        first_s, levels_s = self.first_s + float(self._committed(np.array(first_rows))), float(self.head(np.array([*rows])).sum())
        return levels_s / (first_s + levels_s)

    def _levels_s(self, num_requests: float) -> np.ndarray:
        """Seconds of the head's passes over levels, where 1, 2, ... are drafted: [depth_limit]. The first one needs none."""
        runs = np.minimum.accumulate(self._runs)[1:]  # no level without the one above
        return np.append(0.0, (runs * self.head(num_requests * self._rows[1:])).cumsum())

    def saw_gap(self, seconds: float) -> None:
        """Between the end of a step and the start of the next one lay `seconds`."""
        self.outside_s += self._FADE * (min(seconds, _OUTLIER * max(self.outside_s, 1e-3)) - self.outside_s)

    def _learn(self, probabilities: np.ndarray, levels: np.ndarray, drafted_depth: int, fade: float) -> None:
        few, num_trees = slice(drafted_depth), len(probabilities)
        depths = np.arange(1, drafted_depth + 1)[:, None, None]
        pooled = -np.sort(-np.where(levels <= depths, probabilities, 0.0).reshape(drafted_depth, -1), axis=1)
        summed = np.pad(pooled.cumsum(1), ((0, 0), (1, 1)), mode="constant")
        summed[:, -1] = summed[:, -2]
        places = np.minimum(np.arange(self._profile.shape[1] + 1) * num_trees / self._PER_NODE, pooled.shape[1])
        whole = places.astype(np.int64)
        accepted = summed[:, whole] + (places - whole) * (summed[:, whole + 1] - summed[:, whole])
        best = np.diff(accepted, axis=1) * self._PER_NODE / num_trees
        deepest = np.where(levels == depths, probabilities, 0.0).max(2).mean(1)
        fades = np.maximum(fade, 1 / (1 + self._seen[few]))  # the first ones count in full
        self._profile[few] += fades[:, None] * (best - self._profile[few])
        self._deepest[few] += fades * (deepest - self._deepest[few])
        self._seen[few] += 1

    def _expected(self) -> np.ndarray:
        """The profile. Levels never drafted add a node each, less probable than the last one as that is than its parent."""
        profile = self._profile.copy()
        drafted = int((self._seen > 0).sum())
        if 0 < drafted < self._depth_limit:
            before = self._deepest[drafted - 2] if drafted > 1 else 1.0
            factor = min(self._deepest[drafted - 1] / max(before, 1e-9), 1.0)  # means of different trees
            for depth in range(drafted, self._depth_limit):
                node = self._deepest[drafted - 1] * factor ** (depth - drafted + 1)
                profile[depth] = -np.sort(-np.append(profile[depth - 1], [node] * self._PER_NODE))[: -self._PER_NODE]
        return np.minimum(self.calibration.drift * np.maximum.accumulate(profile, axis=0), 1.0)  # a level more is never worse
