"""The budget: against exhaustive search, and that it stops where speculation does not pay."""

import copy
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_eagle.budget.budget import Budget, Plan, best_number
from vllm_eagle.budget.calibration import Calibration
from vllm_eagle.budget.cost_curve import CostCurve

FLAT = CostCurve([1, 64], [0.02, 0.02])  # a pass costs the same whatever it holds: memory-bound
LINEAR = CostCurve([1, 64], [0.001, 0.064])  # every token costs the same: compute-bound


# ---- calibration


def test_the_confidence_counts_until_something_was_seen() -> None:
    scores = np.array([-0.005, -0.4, -1.3, -3.5, -12.0, -np.inf])
    np.testing.assert_allclose(Calibration()(scores), np.exp(scores), atol=0.06)


def test_a_head_that_is_too_sure_is_seen_through() -> None:
    calibration, generator = Calibration(), np.random.default_rng(0)
    for _ in range(200):
        scores = -generator.exponential(1.0, 64)
        calibration.update(scores, generator.random(64) < np.exp(2 * scores))  # half as good in log as it thinks
    scores = np.array([-0.15, -0.6, -1.25, -2.2])
    np.testing.assert_allclose(calibration(scores), np.exp(2 * scores), atol=0.05)


# An engine in the same process may have switched subnormal numbers off, which hypothesis would refuse to draw then.
SCORES = st.floats(-20, 0, allow_subnormal=False)


@given(st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=60), st.integers(0, 2**32 - 1))
def test_more_confident_is_never_less_probable(seen: list[tuple[float, bool]], seed: int) -> None:
    calibration = Calibration()
    calibration.update(np.array([score for score, _ in seen]), np.array([accepted for _, accepted in seen]))
    found = calibration(np.sort(-np.random.default_rng(seed).exponential(3.0, 50)))
    assert (np.diff(found) >= -1e-12).all()
    assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.3, 0.8])
def test_the_score_of_a_probability(probability: float) -> None:
    calibration = Calibration()
    score = calibration.score_of(probability)
    assert float(calibration(np.array(score))) >= probability
    assert score < -7 or float(calibration(np.array(score - 0.06))) < probability


def test_no_score_is_sure_enough() -> None:
    assert Calibration().score_of(1.0) == 0.0
    assert Calibration().score_of(0.0) == -np.inf


# ---- how many nodes


@given(
    st.lists(st.lists(st.floats(0.01, 1.0), min_size=0, max_size=3), min_size=1, max_size=4),
    st.lists(st.floats(0.01, 1.0), min_size=13, max_size=13),
    st.floats(0, 1, allow_subnormal=False),
)
def test_as_good_as_exhaustive_search(factors: list[list[float]], steps: list[float], drafting_s: float) -> None:
    """Chains of up to three nodes for up to four requests: no choice of prefixes promises more tokens per second."""
    chains = [np.cumprod(chain) for chain in factors]
    cost = CostCurve(range(1, 14), np.cumsum(steps).tolist())
    pool = np.sort(np.concatenate([np.zeros(0), *chains]))[::-1]
    number, rate = best_number(pool, len(chains), cost, drafting_s)
    rates = []
    for lens in product(*(range(len(chain) + 1) for chain in chains)):
        expected = len(chains) + sum(chain[:n].sum() for chain, n in zip(chains, lens, strict=True))
        rates.append(expected / (float(cost(np.array(len(chains) + sum(lens)))) + drafting_s))
    assert rate == pytest.approx(max(rates))
    assert 0 <= number <= len(pool)


def budget(target: CostCurve, head: CostCurve, steps: int = 300, requests: int = 4) -> Budget:
    """One that has seen trees of a good head for a while."""
    made = Budget(copy.deepcopy(target), copy.deepcopy(head), num_draft_tokens=16, depth_limit=8)  # it corrects them
    for _ in range(steps):
        scores, depths = tree()
        made.keep([scores] * requests, [depths] * requests, 8, requests)
    return made


def tree() -> tuple[np.ndarray, np.ndarray]:
    """A chain of 8 likely nodes and 8 less likely brothers."""
    chain = np.cumsum(np.full(8, -0.2))
    scores, depths = np.concatenate([chain, chain - 2.0]), np.tile(np.arange(1, 9), 2)
    order = np.argsort(-scores, kind="stable")
    return scores[order], depths[order]


def settled(made: Budget, num_requests: int = 1) -> Plan:
    """What it plans once it has looked at what it saw last."""
    return [made.plan(num_requests) for _ in range(4)][-1]


CHEAP_HEAD = CostCurve([1, 64], [1e-4, 2e-4])


def test_where_passes_are_free_everything_is_drafted_and_verified() -> None:
    made = budget(FLAT, CHEAP_HEAD)
    assert made.plan(1).depth == 8
    scores, depths = tree()
    assert made.keep([scores], [depths], 8, 1) == [16]


def test_where_tokens_cost_what_they_yield_nothing_is_drafted() -> None:
    made = budget(LINEAR, CHEAP_HEAD)
    assert [made.plan(4).depth for _ in range(20)] == [0] * 20
    scores, depths = tree()
    assert made.keep([scores - 0.4] * 4, [depths] * 4, 8, 4) == [0] * 4  # though drafting is paid for


def test_a_head_as_slow_as_the_target_is_not_asked() -> None:
    assert budget(FLAT, FLAT).plan(1).depth == 0


def test_a_slower_head_is_asked_for_fewer_levels() -> None:
    depths = [budget(FLAT, CostCurve([1, 64], [s, s])).plan(1).depth for s in (1e-4, 2e-3, 4e-3, 1e-2)]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] == 8
    assert 0 < depths[2] < 8


def test_children_that_cannot_pay_are_not_drafted() -> None:
    """The more requests, the more a second of the target's is worth, and the likelier a node must be."""
    made = budget(CostCurve([1, 1024], [0.02, 0.22]), CHEAP_HEAD)
    one, eight = made.plan(1), made.plan(8)
    assert one.node_floor < eight.node_floor - 0.5 < -0.6
    for plan in (one, eight):
        assert float(made.calibration(np.array(plan.node_floor))) == pytest.approx(plan.node_price, rel=0.1)
    assert budget(FLAT, CHEAP_HEAD).plan(1).node_floor == -np.inf


def test_a_level_that_cannot_pay_is_not_drafted() -> None:
    """The price of a level is shared by all requests, each with what its likely nodes are worth more than they cost."""
    made = budget(FLAT, CostCurve([1, 64], [0.004, 0.004]))
    plan = made.plan(4)
    assert plan.level_price == pytest.approx(made.rates(4).max() * 0.004)
    likely, unlikely = np.full((4, 2), -0.5), np.full((4, 2), -4.0)
    assert made.pays(plan, likely)
    assert not made.pays(plan, unlikely)
    assert made.pays(plan, np.concatenate([likely, unlikely]))
    assert not made.pays(plan, np.zeros((4, 0)))


def test_levels_that_rarely_run_cost_little() -> None:
    often, rarely = (budget(FLAT, CostCurve([1, 64], [0.002, 0.002])) for _ in range(2))
    for _ in range(300):
        often.costs.saw_drafting(0.002, 4, 0.014, 1, [1] * 7, 8)
        rarely.costs.saw_drafting(0.002, 4, 0.002, 1, [1], 8)
    assert rarely.rates(1)[8] > 1.1 * often.rates(1)[8]


def test_trees_shrink_as_load_grows() -> None:
    """Free up to 16 tokens, then every token costs."""
    roofline = CostCurve([1, 16, 1024], [0.02, 0.02, 1.3])
    made = budget(roofline, CHEAP_HEAD)
    scores, depths = tree()
    nodes = [sum(made.keep([scores] * n, [depths] * n, 8, n)) / n for n in (1, 4, 16, 64)]
    assert nodes == sorted(nodes, reverse=True)
    assert nodes[0] > 10
    assert nodes[-1] < 3


def test_where_prompts_come_often_fewer_drafts_pay() -> None:
    """Beside a prompt the pass is bound by arithmetic: a draft costs as much as a token that is sure."""
    roofline = CostCurve([1, 256, 1024], [0.02, 0.06, 0.24])
    often, never = budget(roofline, CHEAP_HEAD), budget(roofline, CHEAP_HEAD)
    for step in range(300):
        often.costs.saw_prompts(200 * (step % 2))
        never.costs.saw_prompts(0)
    assert settled(often, 16).node_floor > settled(never, 16).node_floor
    assert often.rates(16).max() / often.rates(16)[0] < 0.8 * never.rates(16).max() / never.rates(16)[0]
    scores, depths = tree()
    fewer, more = (sum(made.keep([scores] * 16, [depths] * 16, 8, 16)) for made in (often, never))
    assert fewer < 0.8 * more
    for _ in range(300):
        often.costs.saw_prompts(100)  # a prompt in every pass
    assert settled(often, 16).depth == 0
    assert sum(often.keep([scores - 0.3] * 16, [depths] * 16, 8, 16)) == 0


def test_sure_requests_get_the_nodes_of_hopeless_ones() -> None:
    made = budget(CostCurve([1, 16, 1024], [0.02, 0.02, 1.3]), CHEAP_HEAD)
    scores, depths = tree()
    sure, hopeless = made.keep([scores, scores - 4.0], [depths, depths], 8, 2)
    assert sure > 3 * hopeless


def test_it_looks_again_less_and_less_often_and_sees_a_change() -> None:
    made = budget(LINEAR, CHEAP_HEAD)
    depths = [made.plan(4).depth for _ in range(2000)]
    probes = np.flatnonzero(depths)
    assert 4 <= len(probes) <= 12
    assert (np.diff(np.diff(probes)) >= 0).all()
    assert all(plan.most_requests == 2 for plan in (made.plan(16) for _ in range(2000)) if plan.depth)
    made.costs.target = FLAT
    assert settled(made, 4).depth == 8


def test_no_trees() -> None:
    made = budget(FLAT, CHEAP_HEAD)
    assert made.keep([], [], 3, 5) == []
    assert made.keep([np.zeros(0)], [np.zeros(0, int)], 3, 5) == [0]


def test_costs_of_drafting_and_of_the_gap_are_followed() -> None:
    made = budget(FLAT, CHEAP_HEAD)
    for _ in range(300):
        made.costs.saw_drafting(0.01, 4, 0.07, 1, [4] * 7, 8)
        made.costs.saw_gap(0.005)
    assert float(made.costs.head(np.array([4] * 7)).sum()) == pytest.approx(0.07, rel=0.1)
    assert made.costs.first_s + float(made.costs.head(np.array(4))) == pytest.approx(0.01, rel=0.05)
    assert made.costs.outside_s == pytest.approx(0.005, rel=0.05)
    assert made.plan(1).depth < 8


def test_what_is_spent_anyway_makes_no_level_dearer() -> None:
    """A slow beginning tells for no drafting or for more of it, not for fewer levels."""
    quick, slow = budget(FLAT, CHEAP_HEAD), budget(FLAT, CHEAP_HEAD)
    for _ in range(100):
        quick.costs.saw_drafting(0.0001, 4, 0.014, 1, [4] * 7, 8)
        slow.costs.saw_drafting(0.003, 4, 0.014, 1, [4] * 7, 8)
    assert settled(slow).depth >= settled(quick).depth > 0
    for _ in range(100):
        slow.costs.saw_drafting(0.1, 4, 0.014, 1, [4] * 7, 8)
    assert settled(slow).depth == 0


def test_what_every_pass_costs_is_shared_by_more_tokens() -> None:
    """Tokens cost what they yield; but if a pass takes 20 ms longer whatever it holds, it had better hold many."""
    made = budget(LINEAR, CHEAP_HEAD)
    assert made.plan(4).depth == 0
    for _ in range(60):
        for tokens in (4, 20):
            made.saw_pass(float(LINEAR(np.array(tokens))) + 0.02, tokens, num_trees=4 * (tokens > 4))
    assert settled(made, 4).depth > 0


def test_what_passes_with_drafts_cost_besides_tells_against_drafting() -> None:
    """Their attention and the walk; it cannot be measured before there are drafts."""
    made = budget(FLAT, CHEAP_HEAD)
    assert settled(made).depth > 0
    for _ in range(200):
        made.saw_pass(0.02, 4, num_trees=0)
        made.saw_pass(0.12, 16, num_trees=1)
    assert made.costs.target.drafts_s(np.array(1)) > 0.07  # the rest is taken for the price of more tokens
    assert made.costs.target.drafts_s(np.array(1)) + float(made.costs.target(np.array(16))) == pytest.approx(0.12, rel=0.15)
    assert float(made.costs.target(np.array(4))) == pytest.approx(0.02, rel=0.1)
    assert settled(made).depth == 0


def test_a_machine_that_becomes_slower_does_not_tell_against_drafting() -> None:
    """Where all passes have drafts, nothing says that drafts are to blame."""
    made = budget(FLAT, CHEAP_HEAD)
    made.saw_pass(0.02, 4, num_trees=0)
    for _ in range(300):
        made.saw_pass(0.02, 16, num_trees=1)
    for _ in range(300):
        made.saw_pass(0.06, 16, num_trees=1)
    assert made.costs.target.drafts_s(np.array(1)) < 0.003
    assert settled(made).depth > 0


def test_where_gains_are_small_what_was_begun_goes_on_and_what_was_not_does_not_begin() -> None:
    began, did_not = (budget(FLAT, CHEAP_HEAD, steps=0) for _ in range(2))
    gain = 1.045  # tokens a pass may take longer for, with drafts; the head costs next to nothing
    for made in (began, did_not):
        for _ in range(300):
            scores = np.log(np.full(1, gain - 1))
            made.calibration.update(np.repeat(scores, 100), np.arange(100) < 100 * (gain - 1))
            made.keep([scores], [np.ones(1, np.int64)], 8, 1)
    assert settled(did_not).depth == 0
    began._best, began._best_for = Plan(1), 1
    assert any(began.plan(1).depth for _ in range(8))


def test_small_gains_are_compared_with_plain_decoding_in_turns() -> None:
    made = budget(CostCurve([1, 16], [0.02, 0.02 * 16]), CHEAP_HEAD)
    made.costs.target = CostCurve([1, 2, 16], [0.02, 0.033, 0.02 * 20])  # the second token costs 0.65 of the first and yields 0.8
    depths = [made.plan(1).depth for _ in range(100)]
    first = next(i for i, depth in enumerate(depths) if depth)
    assert 1.03 < made.rates(1).max() / made.rates(1)[0] < 1.15
    assert depths[first : first + 20].count(0) == 10
    assert depths[-32:].count(0) == 2
    assert 0 not in [budget(FLAT, CHEAP_HEAD).plan(1).depth for _ in range(100)]


def test_catching_up_must_pay_back_soon() -> None:
    """Where much is gained, or the head's passes cost nothing, whatever was missed is caught up with."""
    dear = budget(FLAT, CostCurve([1, 64], [1e-4, 6.4e-3]))
    much, little = dear.plan(1).most_missed, budget(CostCurve([1, 16], [0.02, 0.14]), dear.costs.head).plan(1).most_missed
    assert 1000 < much < 50_000
    assert little < much / 2
    assert budget(FLAT, CostCurve([1, 64], [1e-4, 1e-4])).plan(1).most_missed > 1e6


def test_widths_that_are_said_before_leave_room_for_twice_what_was_useful() -> None:
    made = budget(FLAT, CHEAP_HEAD)
    assert made.profile.widths(8) == [8] * 8
    for _ in range(200):
        made.profile.saw_trees(np.array([2.0, 1.2, 0.9, 0.6, 0.3, 0.0, 0.0, 0.0]), 6)
    assert made.profile.widths(8) == [4, 3, 2, 2, 1, 8, 8, 8]  # of the last ones nothing is known
    assert made.profile.widths(3) == [3, 3, 2, 2, 1, 3, 3, 3]


def test_same_numbers_same_decisions() -> None:
    """Ranks of tensor parallelism are given the same numbers."""
    one, other = budget(FLAT, CHEAP_HEAD), budget(FLAT, CHEAP_HEAD)
    scores, depths = tree()
    for _ in range(50):
        assert one.plan(3).depth == other.plan(3).depth
        assert one.keep([scores] * 3, [depths] * 3, 8, 3) == other.keep([scores] * 3, [depths] * 3, 8, 3)
