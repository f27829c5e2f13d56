"""One request at a time to the OpenAI server: every parameter is answered as by the server without trees."""

import pytest

from tests.serving.server import Pair
from tests.serving.serving_requests import DIGITS, QUESTION, REQUESTS


@pytest.mark.parametrize("name", REQUESTS)
def test_answer_is_that_of_the_plain_server(pair: Pair, name: str) -> None:
    pair.answer(*REQUESTS[name])


def test_parameters_have_their_effect(pair: Pair) -> None:
    """Two servers that both ignored a parameter would agree, too."""
    path, plain = REQUESTS["seeded"]
    [base] = pair.trees.answer(path, plain)["choices"]
    for name in ("another seed", "low temperature", "top_p", "min_p", "logit_bias", "frequency_penalty", "allowed_token_ids"):
        [choice] = pair.trees.answer(*REQUESTS[name])["choices"]
        assert choice["token_ids"] != base["token_ids"], name
    [choice] = pair.trees.answer(*REQUESTS["allowed_token_ids"])["choices"]
    assert set(choice["token_ids"]) <= set(DIGITS)
    [choice] = pair.trees.answer(*REQUESTS["bad_words"])["choices"]
    assert "12" not in choice["text"]
    assert "has 6" not in choice["text"]
    [choice] = pair.trees.answer(*REQUESTS["repetition_detection"])["choices"]
    assert choice["finish_reason"] == "repetition"
    choices = pair.trees.answer(*REQUESTS["n"])["choices"]
    assert len({choice["text"] for choice in choices}) == 3
    [choice] = pair.trees.answer(*REQUESTS["echo"])["choices"]
    assert QUESTION in choice["text"]


def test_usage_counts_what_came(pair: Pair) -> None:
    for name in ("greedy", "seeded", "n", "several prompts", "token ids"):
        answer = pair.trees.answer(*REQUESTS[name])
        completion_tokens = sum(len(choice["token_ids"]) for choice in answer["choices"])
        prompt_tokens = sum(len(choice["prompt_token_ids"]) for choice in answer["choices"][:: REQUESTS[name][1].get("n", 1)])
        assert answer["usage"]["completion_tokens"] == completion_tokens
        assert answer["usage"]["prompt_tokens"] == prompt_tokens
        assert answer["usage"]["total_tokens"] == prompt_tokens + completion_tokens
