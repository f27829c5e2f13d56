"""How many nodes to verify, how deep to draft, and whether to draft at all: what a pass costs against what it is likely to yield.

A node is worth its probability of being accepted; a pass costs T(tokens in it). All nodes of all requests compete in one pool: the
n most probable are kept for which `(requests + sum of their probabilities) / (T(requests + n) + seconds of drafting)` is largest,
which is the expected number of tokens per second. Sure requests get large trees, hopeless ones none; under load n falls to 0.

What it goes by: costs.py (passes), profile.py and calibration.py (trees); turns.py lets it look at what it does not choose.
Numbers in, numbers out: no clock and no chance, so that ranks which are given the same numbers decide alike. numpy only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_eagle.budget.calibration import Calibration
from vllm_eagle.budget.cost_curve import CostCurve
from vllm_eagle.budget.costs import Costs
from vllm_eagle.budget.profile import Profile
from vllm_eagle.budget.turns import Turns

_STEP = 0.1  # how fast the share of requests that draft is followed
_SHARE_FADE = 0.05  # how fast it is forgotten while nothing is drafted
_LOOK_EVERY = 4  # steps between two looks at costs and profile, while the number of requests stays the same
_PROBE_LEVELS = 2  # deeper than what is chosen
_PROBE_SHARE = 8  # where nothing is drafted, one request in so many is looked at: a tree teaches as much, and costs less
# Drafting must promise so much more than plain decoding; below it noise decides, and prompts in the passes. To begin costs the
# head's pass over all that it has missed.
_BEGIN_AT, _STAY_AT = 1.06, 1.03
_PAYS_BACK_IN = 64  # steps, after which it must have paid that the head has caught up with a request


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
    """Decides for one engine. `plan` says what to draft before a step is drafted, `keep` what of it to verify.

    It is told what happened through `costs`, `profile`, `calibration` and `saw_pass`.
    """

    def __init__(
        self,
        target: CostCurve,
        head: CostCurve,  # with logits of every token
        num_draft_tokens: int,
        depth_limit: int,
        committed: CostCurve | None = None,  # the head without logits, as it runs over committed tokens; None: no different
    ):
        self.costs = Costs(target, head, depth_limit, committed)
        self.profile = Profile(num_draft_tokens, depth_limit)
        self.calibration = Calibration()
        self._turns = Turns()
        self._depth_limit = depth_limit
        self._share = 1.0  # of the requests that do draft where drafting is planned
        self._gain = 1.0  # how many times plain decoding's tokens per second drafting promises
        self._steps, self._keeps, self._best, self._best_for = 0, 0, Plan(0), 0

    def plan(self, num_requests: int) -> Plan:
        """What to draft for so many requests. Now and then more than pays, to learn."""
        if num_requests != self._best_for or self._steps % _LOOK_EVERY == 0:
            self._best, self._best_for = self._best_plan(num_requests), num_requests
        self._steps += 1
        best = self._best.depth
        if self._turns.plain(best > 0, self._gain, num_requests):
            self._share += _SHARE_FADE * (1 - self._share)  # others may come that can draft
            if best:
                return Plan(0)
        if self._turns.probe(best, self._depth_limit):
            some = None if best else -(-num_requests // _PROBE_SHARE)
            return Plan(min(best + _PROBE_LEVELS, self._depth_limit), some, self._best.most_missed)
        return self._best

    def _best_plan(self, num_requests: int) -> Plan:
        rates, numbers = self._outlook(num_requests)
        best = int(rates.argmax())
        self._gain = float(rates[best] / rates[0])
        if rates[best] < (_STAY_AT if self._best.depth else _BEGIN_AT) * rates[0]:
            return Plan(0)
        tokens = num_requests * np.array([1.0, 1.0 + _PAYS_BACK_IN])
        head_token_s = float(np.diff(self.costs.committed(tokens))[0]) / _PAYS_BACK_IN  # of one token more of every request
        gained_s = (self._gain - 1) * num_requests / float(rates[best])  # by a step
        most_missed = _PAYS_BACK_IN * gained_s / max(head_token_s, 1e-12)
        rows = num_requests * (1 + float(numbers[best]))
        row_s = float(np.diff(self.costs.decoding_s(np.array([rows - num_requests, rows])))[0]) / num_requests
        node_price, level_price = float(rates[best]) * row_s, float(rates[best] * self.costs.head(np.array(num_requests)))
        return Plan(best, None, most_missed, self.calibration.score_of(node_price), node_price, level_price)

    def pays(self, plan: Plan, scores: np.ndarray) -> bool:
        """Whether another level may pay after one with these scores: a child is at most as probable as its parent."""
        return float(np.maximum(self.calibration(scores) - plan.node_price, 0.0).sum()) >= plan.level_price

    def rates(self, num_requests: int) -> np.ndarray:
        """Tokens per second to expect of drafting 0, 1, ... levels, each with its best number of nodes: [depth_limit + 1]."""
        return self._outlook(num_requests)[0]

    def _outlook(self, num_requests: int) -> tuple[np.ndarray, np.ndarray]:
        """`rates`, and the best numbers of nodes per request."""
        costs = self.costs
        drafting = self._share * num_requests
        nodes, accepted = self.profile.nodes, self.profile.accepted(self.calibration.drift)
        drafts_s = costs.target.drafts_s(drafting * np.minimum(nodes, 1.0))
        seconds = costs.decoding_s(num_requests + drafting * nodes) + costs.outside_s + drafts_s
        # The head runs over what the target commits before it drafts.
        first_s = costs.first_s + costs.committed(drafting * (1 + accepted))
        drafted = (num_requests + drafting * accepted) / (seconds + first_s + costs.levels_s(drafting)[:, None])
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
        if is_probe or self.profile.is_new(drafted_depth) or self._keeps % _LOOK_EVERY == 0:
            self.profile.learn(self.calibration.lasting(padded), levels, drafted_depth, is_probe)
        if not is_probe:
            self._share += _STEP * (len(scores) / num_requests - self._share)
        # A stable sort keeps a parent ahead of a child that is as probable.
        order = np.argsort(-probabilities, axis=None, kind="stable")
        order = order[np.isfinite(padded).ravel()[order]]
        drafting_s = float(self.costs.committed(np.array(len(scores))) + self.costs.levels_s(len(scores))[drafted_depth - 1])
        # A probe is to find out what drafts cost in the target's pass; if it believed that they do not pay, it never would.
        # The first column has the best node of each tree, with which it begins.
        drafts_s = 0.0 if is_probe else self.costs.target.drafts_s((order % most == 0).cumsum())
        spent_s = self.costs.outside_s + self.costs.first_s + drafting_s
        number, _ = best_number(probabilities.ravel()[order], num_requests, self.costs.decoding_s, spent_s, drafts_s)
        counts: list[int] = np.bincount(order[:number] // most, minlength=len(scores)).tolist()
        return counts

    def saw_pass(self, seconds: float, num_tokens: int, num_trees: int) -> None:
        """A target pass over so many tokens, without prompts, took `seconds`; so many requests had drafts in it."""
        if not num_trees:
            self.calibration.saw_none()
        self.costs.saw_pass(seconds, num_tokens, num_trees)
