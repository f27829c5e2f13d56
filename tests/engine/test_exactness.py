"""Losslessness, token by token: with the same seed, tokens with trees equal those of plain vLLM, in float32.

The shipped pair accepts many drafts, so paths are long and compaction is busy; the random pair accepts few, so nearly every
node is rejected. Both are needed.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, RequestOutput, SamplingParams

from tests.engine.engines import assert_same_logprobs, engine, generate, tokens, tree_stats, trees
from tests.tiers import exhaustive, some
from vllm_eagle.pair import HEAD, TARGET

PROMPTS_FILE = Path(__file__).parents[2] / "vllm_eagle" / "prompts" / "gsm8k.jsonl"
MAX_TOKENS = 48


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Chats of mixed length, a one-token prompt among them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    rows = [json.loads(line)["messages"] for line in PROMPTS_FILE.read_text().splitlines()[:31]]
    chats = [tokenizer.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in rows]
    ids = tokenizer(chats, add_special_tokens=False)["input_ids"]
    return [ids[0], [0], *ids[1:]]


def sampling_kinds(end: int, common: int) -> dict[str, dict[str, Any]]:
    """Every sampling parameter on its own; `end` and `common` are tokens that the model likes to use."""
    return {
        "nothing": {},
        "top_k": {"top_k": 20},
        "top_p": {"top_p": 0.9},
        "min_p": {"min_p": 0.05},
        "repetition_penalty": {"repetition_penalty": 1.2},
        "frequency_penalty": {"frequency_penalty": 0.7},
        "presence_penalty": {"presence_penalty": 0.7},
        "logit_bias": {"logit_bias": {common: -4.0, 300: 3.0}},
        "bad_words": {"bad_words": ["the", "is"]},
        "allowed_token_ids": {"allowed_token_ids": list(range(0, 400))},
        "min_tokens": {"min_tokens": 30, "stop_token_ids": [common]},
        "stop_string": {"stop": [".\n", "is 1"]},
        "logprobs": {"logprobs": 3},
        "no_eos": {"ignore_eos": True, "stop_token_ids": [end]},
    }


KINDS = sampling_kinds(end=1, common=224)
TEMPERATURES = {"greedy": 0.0, "T0.7": 0.7, "T1.0": 1.0}


def kind_params(kind: str, temperature: float, **changes: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": temperature, "seed": 7, "max_tokens": MAX_TOKENS} | KINDS[kind] | changes))


def mixed_params(num: int) -> list[SamplingParams]:
    """All kinds and temperatures in one batch, with different seeds and lengths; some ask for several samples."""
    kinds = list(KINDS)
    return [
        kind_params(
            kinds[i % len(kinds)],
            list(TEMPERATURES.values())[i % 3],
            seed=i,
            max_tokens=max([1, 2, 3, 17, 40, 64][i % 6], KINDS[kinds[i % len(kinds)]].get("min_tokens", 0)),
            n=3 if i % 7 == 1 and i % 3 else 1,
        )
        for i in range(num)
    ]


@pytest.fixture(scope="module")
def mixed(prompts: list[list[int]]) -> dict[int, list[RequestOutput]]:
    """What plain vLLM says to batches of 1, 5 and 32, in which every kind occurs."""
    with engine(TARGET) as llm:
        return {num: generate(llm, prompts[:num], mixed_params(num)) for num in (1, 5, 32)}


@pytest.fixture(scope="module")
def alone(prompts: list[list[int]]) -> dict[tuple[str, str], list[RequestOutput]]:
    """What plain vLLM says to five prompts, by kind and temperature: batches of one kind take ways of their own in the sampler."""
    with engine(TARGET) as llm:
        return {
            (kind, name): generate(llm, prompts[:5], kind_params(kind, temperature))
            for kind in KINDS
            for name, temperature in TEMPERATURES.items()
        }


VARIANTS = {
    "dynamic16": trees(HEAD, 16),
    "dynamic16_uncoupled": trees(HEAD, 16, coupled=False),
    "static16": trees(HEAD, 16, mode="static"),
    "chain5": trees(HEAD, 5, mode="chain"),
    "dynamic60": trees(HEAD, 60),
    "dynamic1": trees(HEAD, 1),
}


def assert_same(expected: list[RequestOutput], found: list[RequestOutput], what: Any) -> None:
    assert tokens(found) == tokens(expected), what
    assert [o.outputs[0].finish_reason for o in found] == [o.outputs[0].finish_reason for o in expected], what
    assert [o.outputs[0].text for o in found] == [o.outputs[0].text for o in expected], what
    assert_same_logprobs(expected, found)


def assert_accepted(llm: LLM, variant: str) -> None:
    stats = tree_stats(llm)
    assert stats["num_accepted"] > 100
    assert variant in ("chain5", "dynamic1") or stats["num_moved"] > 50


@pytest.mark.parametrize("variant", some(VARIANTS, "dynamic16", "dynamic16_uncoupled", "static16", "chain5"))
def test_mixed_batches(variant: str, prompts: list[list[int]], mixed: dict[int, list[RequestOutput]]) -> None:
    with engine(TARGET, **VARIANTS[variant]) as llm:
        for number, expected in mixed.items():
            assert_same(expected, generate(llm, prompts[:number], mixed_params(number)), number)
        assert_accepted(llm, variant)


@exhaustive
@pytest.mark.parametrize("variant", VARIANTS)
def test_batches_of_one_kind(variant: str, prompts: list[list[int]], alone: dict[tuple[str, str], list[RequestOutput]]) -> None:
    with engine(TARGET, **VARIANTS[variant]) as llm:
        for (kind, temperature), expected in alone.items():
            if temperature == "T1.0" or variant in ("dynamic16", "dynamic16_uncoupled"):
                found = generate(llm, prompts[:5], kind_params(kind, TEMPERATURES[temperature]))
                assert_same(expected, found, (kind, temperature))
        assert_accepted(llm, variant)


def test_thinking_ends_where_it_ends_without_trees(prompts: list[list[int]]) -> None:
    """A budget of thinking tokens is one request's, whatever row of the batch is its own."""
    from transformers import AutoTokenizer
    from vllm.config.reasoning import ReasoningConfig

    start, end = "Let me think:", "Now I know."
    thinking = AutoTokenizer.from_pretrained(TARGET).encode(start, add_special_tokens=False)
    budgets = [None, 9, 3, None, 0, 17, 9]
    params = [
        SamplingParams(temperature=i % 2, seed=i, max_tokens=MAX_TOKENS, ignore_eos=True, thinking_token_budget=budget)
        for i, budget in enumerate(budgets)
    ]
    asked = [ids if budget is None else [*ids, *thinking] for ids, budget in zip(prompts, budgets, strict=False)]
    outputs = []
    for changes in ({}, trees(HEAD, 16)):
        config = ReasoningConfig(reasoning_start_str=start, reasoning_end_str=end)
        with engine(TARGET, reasoning_config=config, **changes) as llm:
            outputs.append(generate(llm, asked, params))
    assert [end in output.outputs[0].text for output in outputs[0]] == [budget is not None for budget in budgets]
    assert tokens(outputs[1]) == tokens(outputs[0])


@pytest.mark.parametrize(("head", "num_draft_tokens"), some(product(("eagle", "eagle3"), (1, 7, 60)), ("eagle", 60), ("eagle3", 7)))
def test_tokens_equal_plain_vllm_with_an_ignorant_head(head: str, num_draft_tokens: int, random_models: dict[str, Path]) -> None:
    prompts = [[0], [5, 9, 300, 40], list(range(2, 90)), [77] * 33, [400, 3]]
    params = [SamplingParams(temperature=t, seed=i, max_tokens=40, ignore_eos=True) for i, t in enumerate([0, 1, 0.7, 1, 0])]
    with engine(random_models["target"]) as llm:
        expected = tokens(generate(llm, prompts, params))
    with engine(random_models["target"], **trees(random_models[head], num_draft_tokens)) as llm:
        assert tokens(generate(llm, prompts, params)) == expected
        assert tree_stats(llm)["num_verified"] > 0
