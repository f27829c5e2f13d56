"""What the server tells of its speculation: in /metrics and, where vLLM offers it, in each answer."""

from typing import Any

import pytest

from tests.serving.server import Pair
from tests.serving.serving_requests import CHAT, COMPLETIONS, GREEDY, MESSAGES, SEEDED

TREE, DEPTH = 16, 8  # of the server's trees: nodes besides the root, and levels


def asked(pair: Pair, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answer's own account of speculation, and the choice that it is about."""
    answer = pair.trees.answer(COMPLETIONS, body)
    return answer["metrics"]["speculative_decoding"], answer["choices"][0]


@pytest.mark.parametrize("request_", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_the_account_in_an_answer_adds_up(pair: Pair, request_: dict[str, Any]) -> None:
    found, choice = asked(pair, request_ | {"max_tokens": 100, "ignore_eos": True})
    steps, accepted = found["num_spec_steps"], found["per_step_accepted"]
    assert len(accepted) == len(found["per_step_drafted"]) == steps > 0
    assert all(a <= d for a, d in zip(accepted, found["per_step_drafted"], strict=True))
    assert max(accepted) <= DEPTH
    assert max(found["per_step_drafted"]) <= TREE
    assert found["acceptance_histogram"] == [accepted.count(i) for i in range(TREE + 1)]
    assert found["num_accepted_draft_tokens"] == sum(accepted)
    assert found["num_draft_tokens"] == sum(found["per_step_drafted"])
    assert found["mean_acceptance_length"] == pytest.approx(1 + sum(accepted) / steps)
    # One token from the prompt, then each step's and its bonus token; the last step may have had no room for a tree, or too much.
    written = 1 + sum(accepted) + steps
    assert -1 <= written - len(choice["token_ids"]) <= accepted[-1]
    assert found["mean_acceptance_length"] > 2  # this head, these trees


def test_counters_move_as_the_answers_say(pair: Pair) -> None:
    names = {
        "vllm:spec_decode_num_drafts_total": "num_spec_steps",
        "vllm:spec_decode_num_draft_tokens_total": "num_draft_tokens",
        "vllm:spec_decode_num_accepted_tokens_total": "num_accepted_draft_tokens",
        "vllm:spec_decode_num_accepted_tokens_per_pos_total": "num_accepted_draft_tokens",
    }
    before = pair.trees.metrics()
    told = [asked(pair, body | {"max_tokens": 60})[0] for body in (GREEDY, SEEDED)]
    after = pair.trees.metrics()
    for name, key in names.items():
        assert after[name] - before[name] == sum(each[key] for each in told) > 0, name
    assert not any("spec_decode" in name for name in pair.plain.metrics())


@pytest.mark.parametrize(
    ("options", "drafted", "accepted"),
    [({"eagle_num_draft_tokens": 4}, 4, 4), ({"eagle_max_depth": 2}, TREE, 2), ({"eagle_topk": 1}, DEPTH, DEPTH)],
)
def test_a_request_may_have_a_smaller_tree(pair: Pair, options: dict[str, int], drafted: int, accepted: int) -> None:
    found, choice = asked(pair, SEEDED | {"vllm_xargs": options})
    assert max(found["per_step_drafted"]) == drafted
    assert max(found["per_step_accepted"]) <= accepted
    assert choice["token_ids"] == pair.plain.answer(COMPLETIONS, SEEDED)["choices"][0]["token_ids"]


def test_a_request_may_have_no_tree(pair: Pair) -> None:
    found, choice = asked(pair, SEEDED | {"vllm_xargs": {"eagle_num_draft_tokens": 0}})
    assert found["num_draft_tokens"] == found["num_spec_steps"] == 0
    assert choice["token_ids"] == pair.plain.answer(COMPLETIONS, SEEDED)["choices"][0]["token_ids"]


def test_chat_and_streams_tell_it_too(pair: Pair) -> None:
    body = {"messages": MESSAGES, "temperature": 0}
    expected = pair.trees.answer(CHAT, body)["metrics"]["speculative_decoding"]
    last = pair.trees.stream(CHAT, body | {"stream_options": {"include_usage": True}})[-1]
    assert last["metrics"]["speculative_decoding"] == expected
    assert pair.trees.answer(CHAT, body | {"temperature": 1, "seed": 1, "n": 2})["metrics"] is None


def test_prefix_cache_hits(pair: Pair) -> None:
    """The cache is on by default; what it hands out was written by tree steps, too."""
    body = GREEDY | {"prompt": [7 + i * 31 % 4000 for i in range(100)], "max_tokens": 100, "ignore_eos": True}
    [first] = pair.answer(COMPLETIONS, body)["choices"]
    body |= {"prompt": body["prompt"] + first["token_ids"], "max_tokens": 40}
    before = pair.trees.metrics()["vllm:prefix_cache_hits_total"]
    pair.answer(COMPLETIONS, body)
    # More blocks than the first prompt had.
    assert pair.trees.metrics()["vllm:prefix_cache_hits_total"] - before > 128
