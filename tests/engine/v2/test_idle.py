"""While nothing is drafted, a step of vLLM's V2 runner is its own, and the head catches up later: it drafts what it would have."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.engine.v2.bed import Bed, Case
from tests.engine.v2.test_drafts import needs_triton
from tests.engine.v2.test_v2 import MANY, case, trees, with_trees
from tests.models import random_eagle3_head, random_target
from tests.tiers import exhaustive, interpreted
from vllm_eagle.bench.engines.drafters import ours

# What a step without drafts does beside plain V2's: features are kept for the head, and vLLM's own bookkeeping of drafts, which it
# does for every speculator: none are put into the requests' places, and taken out again.
EXCEPTIONS = {
    "engine/v2/backlog.py keep: copy_": 1,
    "vllm/v1/worker/gpu/model_runner.py sample_tokens: fill_": 1,
    "vllm/v1/worker/gpu/model_runner.py sample_tokens: index_put_": 1,
    "vllm/v1/worker/gpu/model_runner.py sample_tokens: index": 1,
}


@interpreted
def test_a_step_without_drafts_is_plain_vllms(bed: Bed) -> None:
    """Operators and launches of kernels, with the functions that ask for them."""
    asked = case([MANY["greedy"], MANY["sampled"]], 12, audit=True, is_async=True)
    expected = bed.run(replace(asked, attention="stock"))
    found = bed.run(with_trees(asked, trees(budget=True), patches=("drafting_never_pays",)))
    assert found.token_ids == expected.token_ids
    mine, plain = found.stats["idle"][2], expected.stats["idle"][2]
    more = {name: number - plain.get(name, 0) for name, number in mine.items() if number > plain.get(name, 0)}
    assert more == EXCEPTIONS
    assert mine.keys() >= plain.keys()


def unequal(trees: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Whether heads drafted different trees."""
    assert len(trees) == len(others) > 0
    return any(
        (one["token_ids"], one["parents"]) != (other["token_ids"], other["parents"])
        or not np.allclose(one["scores"], other["scores"], atol=1e-3)
        for one, other in zip(trees, others, strict=True)
    )


@interpreted
def test_the_head_catches_up(bed: Bed) -> None:
    """With a prompt that comes while nothing is drafted, and with little room."""
    params = [MANY["greedy"] | {"max_tokens": n} for n in (24, 8, 18)]
    asked = case(params, 0, engine={"max_num_seqs": 2})
    expected = bed.run(asked)

    def run(*patches: str) -> Any:
        found = bed.run(with_trees(asked, trees(budget=True), patches=("drafting_comes_and_goes", *patches)))
        assert found.token_ids == expected.token_ids
        return found.recent

    at_once = run("nothing_is_put_off")
    assert not unequal(run(), at_once)
    assert not unequal(run("little_can_be_put_off"), at_once)
    assert unequal(run("what_was_put_off_is_dropped"), at_once)


@exhaustive
def test_features_of_several_layers_wait_too(bed: Bed, tmp_path: Path) -> None:
    target, head = random_target(tmp_path / "target"), random_eagle3_head(tmp_path / "head")
    params = [MANY["greedy"] | {"max_tokens": 20}, MANY["sampled"] | {"max_tokens": 16}]
    asked = Case(str(target), [[5, 6, 7, 8], [9, 10, 11]], params)
    engine = ours(str(head), 8, budget=True, topk=3, max_depth=3)
    usual = with_trees(asked, engine, is_async=True, patches=("drafting_comes_and_goes",))
    expected, found = bed.run(replace(usual, patches=(*usual.patches, "nothing_is_put_off"))), bed.run(usual)
    assert found.token_ids == expected.token_ids == bed.run(asked).token_ids
    assert not unequal(found.recent, expected.recent)


@needs_triton
def test_what_waits_comes_back_in_order_and_once() -> None:
    from vllm_eagle.engine.v2.backlog import Backlog

    backlog = Backlog(5, torch.float32, torch.device("cpu"), num_bytes=11 * 3 * 4)  # 11 tokens

    def keep(**numbers: float) -> bool:
        rows = torch.tensor([*numbers.values(), -1.0])[:, None]  # and a row of padding
        return backlog.keep(np.array([int(name[1:]) for name in numbers]), [rows.expand(-1, 2), rows + 0.5])

    def taken(*slots: int) -> Any:
        waiting = backlog.take(np.array(slots))
        if waiting is None:
            return None
        values = waiting.features
        assert torch.equal(values[:, 0], values[:, 1])
        assert torch.equal(values[:, 0] + 0.5, values[:, 2])
        return waiting.counts.tolist(), values[:, 0].tolist()

    assert taken(0, 1) is None
    assert keep(s3=30, s1=10)
    assert keep(s1=11, s3=31)
    assert keep(s1=12)
    assert taken(1, 0, 3) == ([3, 0, 2], [10, 11, 12, 30, 31])
    assert taken(1, 0, 3) is None
    for i in range(5):  # from the beginning again
        assert keep(s0=i, s2=20 + i)
    backlog.forget(0)
    assert not keep(s0=7, s2=25)  # no room: the head has to be run
    assert taken(0, 1) is None
    assert backlog.is_lost(2)  # which is not in the batch
    assert not backlog.is_lost(0)
    assert keep(s0=7, s4=40)
    backlog.forget(2)
    assert not backlog.is_lost(2)
    assert taken(4, 0) == ([1, 1], [40, 7])


@needs_triton
def test_what_waits_is_cut_into_passes() -> None:
    from vllm_eagle.engine.v2.catching_up import pieces

    counts = np.array([3, 0, 1, 5])
    found = list(pieces(counts, 6))  # two tokens of each request
    assert [piece.places.tolist() for piece in found] == [[0, 2, 3], [0, 3], [3]]
    assert [piece.before.tolist() for piece in found] == [[0, 0, 0], [2, 2], [4]]
    assert [piece.counts.tolist() for piece in found] == [[2, 1, 2], [1, 2], [1]]
    assert [piece.rows.tolist() for piece in found] == [[0, 1, 3, 4, 5], [2, 6, 7], [8]]
    (whole,) = pieces(counts, 100)
    assert whole.rows.tolist() == list(range(9))
