"""CUDA's other attention backends in the engine, their kernels by plain torch: the tokens are those of plain decoding.

Which rows go where, which metadata they take, how parts are merged and what is captured is as on a GPU; kernels' rounding is not.
"""

from typing import Any

import pytest

from tests.engine.v2.bed import Answers, Bed, Case, prompts_of
from tests.engine.v2.test_v2 import HOST_VALUES, MANY, case, trees, with_trees
from tests.tiers import interpreted
from vllm_eagle.pair import TARGET

SIZES = (3, 27)
KINDS = ("greedy", "sampled", "filtered", "greedy")


@pytest.fixture(scope="module")
def plain(bed: Bed) -> tuple[Case, Answers]:
    """More requests than run at a time, of unequal lengths, whose prompts do not fit into one step."""
    params = [MANY[kind] | {"max_tokens": 8 + 3 * i} for i, kind in enumerate(KINDS)]
    asked = case(params, 0, engine={"max_num_seqs": 3, "max_num_batched_tokens": 64})
    assert sum(map(len, prompts_of(TARGET, len(KINDS)))) > 64
    return asked, bed.run(asked)


@interpreted
@pytest.mark.parametrize(
    ("attention", "options", "changes"),
    [
        ("flash", {}, {"audit": True}),
        ("flash", {"budget": True}, {"patches": ("nodes_cost",)}),
        ("flash", {"budget": True}, {"patches": ("nodes_cost", "splits"), "capture_sizes": SIZES}),
        ("xformers", {}, {}),
        ("xformers", {"budget": True}, {"patches": ("nodes_cost",)}),
    ],
)
def test_tokens_are_those_of_plain_decoding(
    bed: Bed, plain: tuple[Case, Answers], attention: str, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    """Prompts come in pieces beside trees, and requests come and go."""
    asked, expected = plain
    found = bed.run(with_trees(asked, trees(**options), attention=attention, is_async=True, **changes))
    assert found.token_ids == expected.token_ids
    assert found.stats["num_moved"] > 0
    if changes.get("audit"):
        assert {line.rpartition(":")[0] for line in found.stats["host_reads"]} <= HOST_VALUES
    if changes.get("capture_sizes"):
        assert found.stats["graphs"]["replayed"] > found.stats["num_passes"]


@interpreted
@pytest.mark.parametrize("attention", ["flash", "xformers"])
def test_trees_that_see_too_much_are_noticed(bed: Bed, plain: tuple[Case, Answers], attention: str) -> None:
    asked, expected = plain
    assert bed.run(with_trees(asked, trees(), attention=attention, patches=("causal_trees",))).token_ids != expected.token_ids


@interpreted
def test_xformers_is_not_captured(bed: Bed, plain: tuple[Case, Answers]) -> None:
    """It takes sizes from the host: vLLM is told so, and captures no whole passes; drafting is none either."""
    asked, expected = plain
    found = bed.run(with_trees(asked, trees(), attention="xformers", is_async=True, capture_sizes=SIZES))
    assert found.token_ids == expected.token_ids
    assert not found.stats["graphs"].get("captured")
