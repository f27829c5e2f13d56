"""Two ranks of tensor parallelism in vLLM's V2 runner: they draft, verify and accept alike, and the tokens are plain decoding's.

What is planned from times, and from copies that arrive late, is planned on the first rank; the others hear of it with what is
scheduled. What a rank counts while it launches steps must therefore be what the other one counts.
"""

from typing import Any

import pytest

from tests.engine.v2.bed import Answers, Bed, Case
from tests.engine.v2.test_v2 import MANY, case, trees, with_trees
from tests.tiers import interpreted

KINDS = ("greedy", "sampled", "filtered", "penalties")
RANKS = {"tensor_parallel_size": 2}


@pytest.fixture(scope="module")
def plain() -> tuple[Case, Answers]:
    """Requests of unequal lengths."""
    params = [MANY[kind] | {"max_tokens": 8 + 2 * i} for i, kind in enumerate(KINDS)]
    asked = case(params, 0, engine=RANKS)
    return asked, Bed.fresh(asked)


@interpreted
@pytest.mark.parametrize(
    ("attention", "is_async", "options", "patches"),
    [
        ("triton", True, {"budget": True}, ("nodes_cost", "ranks_see_other_times")),
        ("triton", True, {"budget": True}, ("drafting_comes_and_goes", "ranks_see_other_times")),
        ("cpu", False, {}, ()),
    ],
)
def test_tokens_are_those_of_plain_decoding(
    plain: tuple[Case, Answers], attention: str, is_async: bool, options: dict[str, Any], patches: tuple[str, ...]
) -> None:
    """With a budget that only the first rank can know."""
    asked, expected = plain
    found = Bed.fresh(with_trees(asked, trees(**options), attention=attention, is_async=is_async, patches=patches))
    assert dict(zip(KINDS, found.token_ids, strict=True)) == dict(zip(KINDS, expected.token_ids, strict=True))
    assert found.stats["num_accepted"] > 10
    first, second = found.stats["of_ranks"]
    for counted in ("num_passes", "decisions"):  # while steps are launched
        assert first[counted] == second[counted]
    if patches:
        assert second["num_verified"] == 0  # it looked at nothing that arrives late
        assert first["decisions"]["tree"] > 0
        return
    for counted in ("num_drafted", "num_verified", "num_accepted", "num_moved", "trees_of_size", "accepted_at_depth"):
        assert first[counted] == second[counted]


@interpreted
def test_ranks_that_draft_for_themselves_are_noticed(plain: tuple[Case, Answers]) -> None:
    asked, expected = plain
    found = Bed.fresh(with_trees(asked, trees(), attention="cpu", patches=("ranks_draft_for_themselves",)))
    assert found.token_ids != expected.token_ids
    first, second = found.stats["of_ranks"]
    assert first["num_accepted"] != second["num_accepted"]


@interpreted
def test_drafting_that_fails_ends_the_engine(plain: tuple[Case, Answers]) -> None:
    """One rank cannot stop alone, while the other waits for it."""
    with pytest.raises(Exception, match="as a test wants it"):
        Bed.fresh(with_trees(plain[0], trees(), attention="cpu", patches=("drafting_fails",)))
