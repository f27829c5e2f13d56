"""Trees in vLLM's V2 runner give the tokens that it gives without speculation; and breaking the engine is noticed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.v2.bed import Answers, Bed, Case, prompts_of
from tests.models import random_eagle3_head, random_target
from tests.tiers import exhaustive, some
from vllm_eagle.bench.engines.drafters import ours
from vllm_eagle.pair import HEAD, TARGET

MANY: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "seed": 5},
    "filtered": {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.02, "seed": 11},
    "penalties": {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    "bad words": {"temperature": 0.0, "bad_words": ["the", "of"], "min_tokens": 4},
    "biased": {"temperature": 1.0, "seed": 9, "logit_bias": {300: 4.0, 17: -5.0}},
    "logprobs": {"temperature": 0.0, "logprobs": 2},
}


HOST_VALUES = {
    "attention/tree_impl.py attach_prefix",
    "engine/v2/runner.py _attach",
    "engine/v2/speculator.py _level_pass",
}


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    found = Bed()
    yield found
    found.close()


def case(params: list[dict[str, Any]], max_tokens: int, **changes: Any) -> Case:
    prompts = prompts_of(TARGET, len(params))
    return Case(str(TARGET), prompts, [{"max_tokens": max_tokens} | each for each in params], **changes)


def trees(num_draft_tokens: int = 8, **options: Any) -> dict[str, Any]:
    return ours(str(HEAD), num_draft_tokens, **({"budget": False, "topk": 3, "max_depth": 3} | options))


def with_trees(plain: Case, engine: dict[str, Any], **changes: Any) -> Case:
    return Case(plain.model, plain.prompts, plain.params, plain.engine | engine, **changes)


@pytest.fixture(scope="module")
def plain(bed: Bed) -> tuple[Case, Answers]:
    """Requests of all kinds at once, more than run at a time."""
    asked = case(list(MANY.values()), 12)
    return asked, bed.run(asked)


@pytest.mark.parametrize(
    ("attention", "is_async", "options"),
    some(
        [
            ("triton", True, {}),
            ("cpu", False, {}),
            ("triton", False, {"mode": "static"}),
            ("cpu", True, {"mode": "chain"}),
            ("cpu", True, {"coupled": False}),
        ],
        ("triton", True, {}),
    ),
)
def test_requests_of_all_kinds(
    bed: Bed, plain: tuple[Case, Answers], attention: str, is_async: bool, options: dict[str, Any]
) -> None:
    asked, expected = plain
    found = bed.run(with_trees(asked, trees(**options), attention=attention, is_async=is_async, audit=True))
    assert dict(zip(MANY, found.token_ids, strict=True)) == dict(zip(MANY, expected.token_ids, strict=True))
    assert found.stats["tau"] > 1.7
    assert found.stats["num_moved"] > (0 if options.get("mode") != "chain" else -1)  # branches were accepted
    # A step waits for nothing: what is read is on the host already, bounds on lengths and where the rows of requests begin.
    if attention == "triton":  # the test bed moves slots of CPU attention itself
        assert {line.rpartition(":")[0] for line in found.stats["host_reads"]} <= HOST_VALUES
    place = list(MANY).index("logprobs")
    for position, twin in zip(expected.logprobs[place], found.logprobs[place], strict=True):
        assert position.keys() == twin.keys()
        for token, logprob in position.items():
            assert twin[token].logprob == pytest.approx(logprob.logprob, abs=2e-3)
            assert twin[token].rank == logprob.rank


@exhaustive
def test_chunked_prompts_and_preemption(bed: Bed) -> None:
    """Prompts come in pieces beside trees; then four blocks of 32 for four requests."""
    asked = case([MANY["greedy"], MANY["sampled"]] * 2, 20)
    expected = bed.run(asked)
    chunked = trees() | {"max_num_batched_tokens": 64, "enable_chunked_prefill": True}
    tight = trees() | {"num_gpu_blocks_override": 12, "enable_prefix_caching": True}
    for engine in (chunked, tight):
        assert bed.run(with_trees(asked, engine, attention="triton", is_async=True)).token_ids == expected.token_ids


@exhaustive
def test_limits_of_length(bed: Bed) -> None:
    """The model's length ends in the middle of trees."""
    longest = max(map(len, prompts_of(TARGET, 2)))
    asked = case([MANY["greedy"], MANY["sampled"]], 40, engine={"max_model_len": longest + 13})
    assert bed.run(with_trees(asked, trees(), attention="cpu", is_async=True)).token_ids == bed.run(asked).token_ids


@exhaustive
def test_eagle3(bed: Bed, tmp_path: Path) -> None:
    """Random models: features of several layers, a draft vocabulary of the head's own."""
    target, head = random_target(tmp_path / "target"), random_eagle3_head(tmp_path / "head")
    asked = Case(
        str(target), [[5, 6, 7, 8], [9, 10, 11]], [MANY["greedy"] | {"max_tokens": 16}, MANY["sampled"] | {"max_tokens": 16}]
    )
    engine = ours(str(head), 8, budget=False, topk=3, max_depth=3)
    found = bed.run(with_trees(asked, engine, attention="triton", is_async=True))
    assert found.token_ids == bed.run(asked).token_ids
    assert found.stats["num_verifications"] > 0


@exhaustive
@pytest.mark.parametrize("broken", ["no_compaction", "causal_trees", "positions_by_row"])
def test_breaking_the_engine_is_noticed(bed: Bed, plain: tuple[Case, Answers], broken: str) -> None:
    asked, expected = plain
    assert bed.run(with_trees(asked, trees(), attention="cpu", patches=(broken,))).token_ids != expected.token_ids
