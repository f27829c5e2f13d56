"""Log-probabilities of drafted and accepted tokens are those of plain decoding, and of reading the answer as a prompt."""

from typing import Any

import pytest

from tests.serving.server import Pair, at_once
from tests.serving.serving_requests import CHAT, COMPLETIONS, GREEDY, MESSAGES, SEEDED, chats

VOCABULARY = 4096


def token_id(token: str) -> int:
    """The servers run with --return-tokens-as-token-ids."""
    return int(token.removeprefix("token_id:"))


@pytest.mark.parametrize("request_", [GREEDY, SEEDED, SEEDED | {"n": 2, "temperature": 1.5}], ids=["greedy", "seeded", "n"])
@pytest.mark.parametrize("logprobs", [0, 1, 5, 20])
def test_completions(pair: Pair, request_: dict[str, Any], logprobs: int) -> None:
    for choice in pair.answer(COMPLETIONS, request_ | {"logprobs": logprobs})["choices"]:
        found = choice["logprobs"]
        assert [token_id(token) for token in found["tokens"]] == choice["token_ids"]
        assert len(found["token_logprobs"]) == len(found["text_offset"]) == len(choice["token_ids"])
        for token, value, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
            assert top[token] == value <= 0
            assert len(top) in (logprobs, logprobs + 1) if logprobs else len(top) == 1


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 8}], ids=["greedy", "seeded"])
def test_chat(pair: Pair, sampling: dict[str, Any]) -> None:
    body = {"messages": MESSAGES, "max_tokens": 40, "logprobs": True, "top_logprobs": 3, "return_token_ids": True} | sampling
    [choice] = pair.answer(CHAT, body)["choices"]
    assert [token_id(each["token"]) for each in choice["logprobs"]["content"]] == choice["token_ids"]
    spelled = bytes(byte for each in choice["logprobs"]["content"] for byte in each["bytes"])
    assert spelled.removesuffix(b"</s>") == choice["message"]["content"].encode()


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 2}], ids=["greedy", "seeded"])
def test_decoding_and_prefill_agree(pair: Pair, sampling: dict[str, Any]) -> None:
    """The server with trees, asked to read prompt and answer, gives the answer the log-probabilities that it was written with."""
    body = {"max_tokens": 80, "logprobs": 1, "return_token_ids": True} | sampling
    [written] = pair.trees.answer(COMPLETIONS, GREEDY | body)["choices"]
    ids = written["prompt_token_ids"] + written["token_ids"]
    [read] = pair.trees.answer(COMPLETIONS, {"prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0})["choices"]
    answer = read["prompt_logprobs"][len(written["prompt_token_ids"]) :]
    expected = [position[str(token)]["logprob"] for position, token in zip(answer, written["token_ids"], strict=True)]
    assert written["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-3)


def test_prompt_logprobs_and_echo(pair: Pair) -> None:
    for changes in ({"prompt_logprobs": 0}, {"prompt_logprobs": 3, "logprobs": 1}):
        [choice] = pair.answer(COMPLETIONS, GREEDY | changes)["choices"]
        assert len(choice["prompt_logprobs"]) == len(choice["prompt_token_ids"])
    [choice] = pair.answer(COMPLETIONS, GREEDY | {"echo": True, "logprobs": 2, "return_token_ids": False})["choices"]
    assert len(choice["logprobs"]["tokens"]) > GREEDY["max_tokens"]
    pair.answer(COMPLETIONS, {"prompt": [5, 6, 7, 8, 9], "echo": True, "logprobs": 1, "max_tokens": 0})
    pair.answer(CHAT, {"messages": MESSAGES, "temperature": 0, "max_tokens": 8, "prompt_logprobs": 2})


def test_chosen_tokens(pair: Pair) -> None:
    [choice] = pair.answer(COMPLETIONS, SEEDED | {"logprobs": 1, "logprob_token_ids": [5, 96, 1648]})["choices"]
    for top in choice["logprobs"]["top_logprobs"]:
        assert {5, 96, 1648} <= {token_id(token) for token in top}


def test_mixed_requests_at_once(pair: Pair) -> None:
    """In one batch some want none, some the token's own, some five and one the whole vocabulary's worth that vLLM allows."""

    def check(case: tuple[int, list[dict[str, str]]]) -> None:
        index, messages = case
        top = (None, 0, 1, 5, 20)[index % 5]
        body: dict[str, Any] = {"messages": messages, "seed": index, "temperature": index % 3 / 2, "max_tokens": 40}
        if top is not None:
            body |= {"logprobs": True, "top_logprobs": top}
        [choice] = pair.answer(CHAT, body)["choices"]
        assert (choice["logprobs"] is None) == (top is None)
        assert top is None or all(len(each["top_logprobs"]) >= top for each in choice["logprobs"]["content"])

    at_once(check, list(enumerate(chats(10))))
