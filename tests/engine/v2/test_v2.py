"""Trees in vLLM's V2 runner give the tokens that it gives without speculation; and breaking the engine is noticed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine.v2.bed import Answers, Bed, Case, prompts_of
from tests.models import random_eagle3_head, random_target
from tests.tiers import exhaustive, interpreted, some
from vllm_eagle.bench.engines.drafters import ours
from vllm_eagle.bench.passes.lora import random_adapter
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
    "attention/cuda.py attach_prefix",
    "attention/tree_impl.py attach_prefix",
    "engine/v2/runner.py _attach",
    "engine/v2/speculator.py _draft",
}


def case(params: list[dict[str, Any]], max_tokens: int, model: str = str(TARGET), **changes: Any) -> Case:
    prompts = prompts_of(TARGET, len(params))
    return Case(model, prompts, [{"max_tokens": max_tokens} | each for each in params], **changes)


def trees(num_draft_tokens: int = 8, **options: Any) -> dict[str, Any]:
    return ours(str(HEAD), num_draft_tokens, **({"budget": False, "topk": 3, "max_depth": 3} | options))


def with_trees(plain: Case, engine: dict[str, Any], **changes: Any) -> Case:
    return replace(plain, engine=plain.engine | engine, **changes)


@pytest.fixture(scope="module")
def plain(bed: Bed) -> tuple[Case, Answers]:
    """Requests of all kinds at once, more than run at a time."""
    asked = case(list(MANY.values()), 12)
    return asked, bed.run(asked)


@pytest.mark.parametrize(
    ("attention", "is_async", "options"),
    some(
        [
            ("triton", True, {"budget": True}),
            ("triton", True, {}),
            ("cpu", False, {}),
            ("triton", False, {"mode": "static"}),
            ("cpu", True, {"mode": "chain"}),
            ("cpu", True, {"coupled": False}),
        ],
        ("triton", True, {"budget": True}),
        others=interpreted,
    ),
)
def test_requests_of_all_kinds(
    bed: Bed, plain: tuple[Case, Answers], attention: str, is_async: bool, options: dict[str, Any]
) -> None:
    """With a budget, one that takes nodes to cost something: how many of a tree are verified is decided on the device."""
    asked, expected = plain
    patches = ("nodes_cost",) if options.get("budget") else ()
    found = bed.run(with_trees(asked, trees(**options), attention=attention, is_async=is_async, audit=True, patches=patches))
    assert dict(zip(MANY, found.token_ids, strict=True)) == dict(zip(MANY, expected.token_ids, strict=True))
    assert found.stats["tau"] > (1.7 if not patches else 1.5)
    assert found.stats["num_moved"] > (0 if options.get("mode") != "chain" else -1)  # branches were accepted
    sizes = {size for size, number in enumerate(found.stats["trees_of_size"]) if number}
    assert max(sizes) == 8
    assert not patches or len(sizes) > 3
    # A step waits for nothing: what is read is on the host already, bounds on lengths and where the rows of requests begin.
    if attention == "triton":  # the test bed moves slots of CPU attention itself
        assert {line.rpartition(":")[0] for line in found.stats["host_reads"]} <= HOST_VALUES
    place = list(MANY).index("logprobs")
    same_logprobs(expected.logprobs[place], found.logprobs[place])
    counted(found, asked)


@interpreted
def test_a_window_over_the_head_changes_drafts_alone(bed: Bed) -> None:
    asked = case([MANY["greedy"], MANY["sampled"]], 10)
    expected = bed.run(asked)
    whole, limited = (bed.run(with_trees(asked, trees(draft_window=window), attention="triton")) for window in (0, 12))
    assert whole.token_ids == limited.token_ids == expected.token_ids
    assert limited.stats["num_drafted"] > 0
    assert limited.stats["tau"] != whole.stats["tau"]


def same_logprobs(expected: Any, found: Any) -> None:
    """Of every position, with ranks."""
    assert len(expected) == len(found)
    for position, twin in zip(expected, found, strict=True):
        assert (position is None) == (twin is None)
        for token, logprob in (position or {}).items():
            assert twin[token].logprob == pytest.approx(logprob.logprob, abs=2e-3)
            assert twin[token].rank == logprob.rank
        assert position is None or position.keys() == twin.keys()


def counted(found: Answers, asked: Case) -> None:
    """What the page and the metrics show is what happened."""
    stats = found.stats
    assert 0 < stats["num_accepted"] < stats["num_verified"] <= stats["num_drafted"]
    assert stats["decisions"]["tree"] >= stats["num_verifications"]
    assert all(stats["stage_seconds"][stage] > 0 for stage in ("draft", "verify", "accept", "compact"))
    assert len(found.recent) == 8
    answers, in_answers = [f",{','.join(map(str, ids))}," for ids in found.token_ids], 0
    for tree in found.recent:
        tokens, path = tree["token_ids"], tree["path"]
        assert [tokens[node] for node in path] == tree["emitted"][:-1]
        assert [tree["parents"][node] for node in path] == [0, *path][:-1]
        in_answers += any(f",{tokens[0]},{tree['emitted'][0]}," in answer for answer in answers)
    assert in_answers >= 3  # others are of steps that were launched before it was known that an answer had ended


@interpreted
def test_where_drafting_does_not_pay_nothing_is_drafted(bed: Bed, plain: tuple[Case, Answers]) -> None:
    """Or to look at it, now and then. What steps without drafts do: test_idle.py."""
    asked, expected = plain
    found = bed.run(with_trees(asked, trees(budget=True), is_async=True, patches=("drafting_never_pays",)))
    assert found.token_ids == expected.token_ids
    stats = found.stats
    assert stats["decisions"]["budget"] > 4 * stats["decisions"]["tree"]
    assert stats["num_passes"] > 2 * stats["num_verifications"]


@interpreted
@pytest.mark.parametrize("is_async", [False, True])
def test_drafting_that_fails_is_switched_off(bed: Bed, plain: tuple[Case, Answers], is_async: bool) -> None:
    asked, expected = plain
    found = bed.run(with_trees(asked, trees(), is_async=is_async, patches=("drafting_fails",)))
    assert found.token_ids == expected.token_ids
    stats = found.stats
    assert (stats["num_drafting_errors"], stats["speculation_off"]) == (1, 1)
    assert stats["decisions"]["failed"] > 0
    assert 0 < stats["num_verifications"] < stats["num_passes"]


REGEX = "(Janet|Tom) has [0-9]{1,3} (apples|pears) and [0-9]{2} (coins|books)[.]"


@interpreted
@pytest.mark.parametrize("is_async", [False, True])
def test_what_requests_ask_for_besides(bed: Bed, is_async: bool) -> None:
    """Several answers each, logprobs of prompts and of given tokens, a grammar, and smaller trees or none."""
    params: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 4, "n": 2},
        {"temperature": 0.0, "prompt_logprobs": 2, "logprobs": 1},
        {"temperature": 0.0, "logprob_token_ids": [5, 300, 17]},
        {"temperature": 1.0, "seed": 5, "structured": {"regex": REGEX}},
        {"temperature": 0.0, "extra_args": {"eagle_num_draft_tokens": 0}},
        {"temperature": 1.0, "seed": 6, "extra_args": {"eagle_num_draft_tokens": 3, "eagle_topk": 1}},
        {"temperature": 0.0, "extra_args": {"eagle_max_depth": 1}},
    ]
    asked = case(params, 16)
    expected, found = bed.run(asked), bed.run(with_trees(asked, trees(budget=True), is_async=is_async, patches=("nodes_cost",)))
    assert found.token_ids == expected.token_ids
    for i in (2, 3):  # the second and third request, behind two answers of the first
        same_logprobs(expected.logprobs[i], found.logprobs[i])
    same_logprobs(expected.prompt_logprobs[1], found.prompt_logprobs[1])
    assert found.stats["num_verifications"] > 0


@interpreted
@pytest.mark.parametrize(
    ("mode", "kinds"),
    [
        ("raw_logits", ("greedy", "filtered")),
        ("processed_logprobs", ("greedy", "filtered", "biased")),
        ("processed_logits", ("filtered", "penalties")),
    ],
)
def test_what_logprobs_are_of(bed: Bed, mode: str, kinds: tuple[str, ...]) -> None:
    """Of what the model says, or of what was sampled from, also where that depends on the path to a node."""
    params = [MANY[kind] | {"logprobs": 3} for kind in kinds]
    asked = case([*params, MANY["sampled"] | {"logprob_token_ids": [5, 300, 17]}], 12, engine={"logprobs_mode": mode})
    expected, found = bed.run(asked), bed.run(with_trees(asked, trees(), attention="cpu", is_async=True))
    assert found.token_ids == expected.token_ids
    for plain_logprobs, logprobs in zip(expected.logprobs, found.logprobs, strict=True):
        same_logprobs(plain_logprobs, logprobs)
    assert found.stats["num_moved"] > 0


@interpreted
def test_what_vllm_warms_up_with_leaves_nothing_behind(bed: Bed) -> None:
    """Neither trees nor counts."""
    asked = case([MANY["greedy"], MANY["sampled"]], 8)
    cold, warm = (bed.run(with_trees(asked, trees(), attention="cpu", patches=patches)) for patches in ((), ("warmed_up",)))
    assert warm.token_ids == cold.token_ids == bed.run(asked).token_ids
    for counted in ("num_passes", "num_drafted", "num_verified", "num_accepted", "decisions"):
        assert warm.stats[counted] == cold.stats[counted]


@exhaustive
def test_processors_of_users(bed: Bed) -> None:
    engine = {"logits_processors": ["tests.engine.v2.processors:OddAfterEven"]}
    params = [MANY["greedy"], MANY["sampled"]]
    asked = case(params, 12, engine=engine)
    expected, found = bed.run(asked), bed.run(with_trees(asked, trees(), is_async=True))
    assert found.token_ids == expected.token_ids
    assert found.stats["num_accepted"] > 0
    assert bed.run(case(params, 12)).token_ids != expected.token_ids


@interpreted
@pytest.mark.parametrize("is_async", [False, True])
def test_sessions_whose_prompt_goes_on(bed: Bed, is_async: bool) -> None:
    """They get no drafts; other requests do."""
    params = [{"temperature": t, "seed": 3, "max_tokens": 12, "output_kind": 1} for t in (0, 1)]  # DELTA
    asked = Case(str(TARGET), [], params, sessions=True)
    found = bed.run(with_trees(asked, trees(), is_async=is_async))
    assert found.token_ids == bed.run(asked).token_ids
    assert found.stats["num_passes"] > 0
    assert found.stats["num_verifications"] == 0


@exhaustive
def test_adapters(bed: Bed, tmp_path: Path) -> None:
    """Two adapters in one batch; the head drafts for the base model, and each request has as many drafts as the scheduler says."""
    folders = tuple(str(random_adapter(TARGET, tmp_path / f"{i}", 0.1 * i, seed=i)) for i in (1, 2))
    engine = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    asked = case([MANY["greedy"], MANY["sampled"]], 16, engine=engine, adapters=folders)
    expected = bed.run(asked)
    found = bed.run(with_trees(asked, trees(budget=True), attention="cpu", is_async=True, patches=("nodes_cost",)))
    assert found.token_ids == expected.token_ids
    assert found.stats["num_accepted"] > 0
    assert bed.run(case([MANY["greedy"], MANY["sampled"]], 16)).token_ids != expected.token_ids


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
@pytest.mark.parametrize("broken", ["no_compaction", "causal_trees", "positions_by_row", "noise_of_elsewhere"])
def test_breaking_the_engine_is_noticed(bed: Bed, plain: tuple[Case, Answers], broken: str) -> None:
    asked, expected = plain
    assert bed.run(with_trees(asked, trees(), attention="cpu", patches=(broken,))).token_ids != expected.token_ids
