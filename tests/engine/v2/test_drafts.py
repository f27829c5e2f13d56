"""How many drafts there are: planned from what arrived late, said through the scheduler, split as planned. No engine runs."""

import pickle
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.budget.budget import Budget
from vllm_eagle.budget.cost_curve import CostCurve
from vllm_eagle.engine.v2.budgeting import Budgeting
from vllm_eagle.engine.v2.drafts import Drafts, said, say
from vllm_eagle.engine.v2.late import LateReads

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs triton: pip install --no-deps -r vllm_eagle/locks/interop.lock"
)


def budgeting(target: list[float], head: list[float], splits: bool = True) -> Budgeting:
    curves = (CostCurve([2**i for i in range(len(curve))], curve) for curve in (target, head))
    return Budgeting(Budget(*curves, 8, 4), TreeConfig(8, max_depth=4), splits)


CHEAP, DEAR = [0.01] * 7, [10.0] * 7
FLAT, STEEP = [1.0] * 7, [1.0, 1.9, 3.7, 7.3, 14.5, 29.0, 58.0]


def drafted(found: Budgeting, number: int = 2) -> None:
    """Chains of three likely nodes and one that is not."""
    scores = np.tile(np.array([0.0, -0.05, -0.1, -0.15, -6.0], dtype=np.float32), (number, 1))
    depths = np.tile(np.arange(5), (number, 1))
    found.drafted(4, np.full(number, 5), scores, depths, (depths - 1).clip(min=0))


@pytest.mark.parametrize("splits", [True, False])
def test_what_pays_is_drafted_and_what_does_not_is_not(splits: bool) -> None:
    cheap, dear = budgeting(FLAT, CHEAP, splits), budgeting(FLAT, DEAR, splits)
    for _ in range(40):
        for each in (cheap, dear):
            each.plan(2)
            drafted(each)
    plans = [cheap.plan(2) for _ in range(20)]
    assert sum(plan.depth >= 3 for plan in plans) > 15
    assert {(plan.most, plan.per_request) for plan in plans if plan.depth} == {(8 if splits else 4, 4.0)}
    assert {plan.widths for plan in plans if plan.depth} == {(2, 2, 2, 8)}  # twice a chain's; the last level has no children
    assert sum(dear.plan(2) == Drafts(0, 0, None, dear._per_request) for _ in range(20)) > 15


def test_nodes_that_are_not_worth_their_place_are_not_counted() -> None:
    found = budgeting(STEEP, CHEAP)
    for _ in range(40):
        found.plan(2)
        drafted(found)
    assert 0 <= found._per_request < 2


def test_what_was_accepted_teaches_what_to_expect() -> None:
    found = budgeting(FLAT, CHEAP)
    scores = np.array([[0.0, -0.05, -0.1, -0.15], [0.0, -0.05, -0.1, -0.15]], dtype=np.float32)
    before = found._budget.calibration(np.array([-0.05]))
    for _ in range(100):  # of the second request the root alone was scored
        found.verified(np.array([4, 1]), np.array([[0, 0, 0], [0, 0, 0]]), scores)
    assert found._budget.calibration(np.array([-0.05])) < 0.3 * before
    for _ in range(1000):
        found.verified(np.array([4, 1]), np.array([[1, 2, 3], [0, 0, 0]]), scores)
    assert found._budget.calibration(np.array([-0.05])) > 0.9


@pytest.mark.parametrize("output", [ModelRunnerOutput([], {}), SchedulerOutput.make_empty()], ids=lambda x: type(x).__name__)
def test_what_is_said_goes_to_other_processes(output: Any) -> None:
    assert said(output) is None
    say(output, Drafts(5, 3, (4, 2), 1.5))
    assert said(pickle.loads(pickle.dumps(output))) == Drafts(5, 3, (4, 2), 1.5)  # as vLLM sends it


@needs_triton
@pytest.mark.parametrize(
    ("per_request", "most_logits", "expected"),
    [(None, 1000, 10), (1.2, 1000, 3), (0.0, 1000, 0), (9.0, 1000, 10), (None, 9, 6), (None, 2, 0)],
)
def test_the_total_is_what_was_planned(per_request: float | None, most_logits: int, expected: int) -> None:
    """Two requests with drafts, one that decodes and one with a prompt."""
    from vllm_eagle.engine.v2.split import DraftSplit

    split = DraftSplit.__new__(DraftSplit)
    split.per_request, split._max_total_logits, split.num_bonus_tokens = per_request, most_logits, 1
    drafts = {"a": [-1] * 8, "b": [-1] * 2}
    others = {"a": 1, "b": 1, "c": 1, "d": 40}
    scheduled = {req_id: number + len(drafts.get(req_id, ())) for req_id, number in others.items()}
    # Logits in one piece: one of each request, and as many more.
    expected = min(expected, max(0, most_logits - 4))
    assert split.get_num_tokens(scheduled, drafts) == 43 + expected
    assert split._batch_budget == ({"a": 8, "b": 2, "c": 0, "d": 0}, others, expected)


class Asked:
    """A request, as far as the scheduler of drafts looks at it."""

    def __init__(self, resumable: bool = False, **extra_args: Any):
        self.resumable, self.sampling_params = resumable, SimpleNamespace(extra_args=extra_args)
        self.spec_token_ids = [-1] * 8


@needs_triton
def test_requests_have_as_many_drafts_as_they_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_eagle.engine.v2 import scheduler

    found = scheduler.EagleTreeScheduler.__new__(
        scheduler.EagleTreeScheduler, SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=True))
    )
    monkeypatch.setattr(scheduler.Scheduler, "add_request", lambda self, request: None)
    monkeypatch.setattr(scheduler.AsyncScheduler, "_update_after_schedule", lambda self, output: None)
    found._most_drafts, found.num_spec_tokens = WeakKeyDictionary(), 8
    found.requests = {
        "usual": Asked(),
        "off": Asked(eagle_num_draft_tokens=0),
        "few": Asked(eagle_num_draft_tokens=3),
        "session": Asked(resumable=True),
        "nonsense": Asked(eagle_num_draft_tokens="many"),
    }
    for request in found.requests.values():
        found.add_request(request)  # type: ignore[arg-type]
    found._update_after_schedule(SimpleNamespace(num_scheduled_tokens=dict.fromkeys([*found.requests, "gone"], 1)))  # type: ignore[arg-type]
    numbers = {req_id: len(request.spec_token_ids) for req_id, request in found.requests.items()}
    assert numbers == {"usual": 8, "off": 0, "few": 3, "session": 0, "nonsense": 8}


def test_late_reads_are_what_was_there_when_they_were_asked_for() -> None:
    late, seen = LateReads(torch.device("cpu")), []
    values = torch.arange(3)
    late.send(lambda found, seconds: seen.append((found.tolist(), seconds)), values, marks=[1.0, 1.5, 4.0])
    late.send(lambda found: seen.append(found.tolist()), values + 1)
    values += 10
    assert seen == []
    late.poll()
    assert seen == [([0, 1, 2], [0.5, 2.5]), [1, 2, 3]]
    late.poll()
    assert len(seen) == 2


@needs_triton
def test_a_graph_is_replayed_unless_far_less_is_planned() -> None:
    from vllm_eagle.engine.v2.speculator import TreeSpeculator

    worth = TreeSpeculator._is_worth_it
    assert worth([2000, 2000], 200, None)
    assert worth([2000, 2000], 200, (6, 5, 8))
    assert not worth([2000, 2000], 200, (2, 2, 8))
    assert worth([240, 240], 24, (1, 1, 8))  # few rows
    assert worth([], 200, (1, 1, 8))


@needs_triton
def test_roots_see_themselves_before_anything_is_drafted() -> None:
    """A captured pass takes every request for a tree."""
    from vllm_eagle.engine.v2.slots import SlotTrees

    found = SlotTrees(2, 4, torch.device("cpu"))
    found.clear(torch.tensor([1]))
    assert found.ancestors[:, 0].tolist() == [[True, False, False, False]] * 3
