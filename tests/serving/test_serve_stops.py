"""Where answers end. A step may accept tokens beyond the end; nothing of them may be seen."""

import pytest

from tests.serving.server import Pair, at_once
from tests.serving.serving_requests import CHAT, COMPLETIONS, GREEDY, MESSAGES, PROMPT, SEEDED, chats

EOS = 1
SPACE, ONE = 224, 20


@pytest.mark.parametrize("request_", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5, 17, 18])
def test_max_tokens(pair: Pair, request_: dict[str, object], max_tokens: int) -> None:
    [choice] = pair.answer(COMPLETIONS, request_ | {"max_tokens": max_tokens})["choices"]
    assert len(choice["token_ids"]) == max_tokens
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("stop", [[" pencils"], ["12", "6"], ["has 1"], ["\n"], ["ncil", "x"], "He"])
@pytest.mark.parametrize("include", [False, True], ids=["cut", "kept"])
def test_stop_strings(pair: Pair, stop: list[str] | str, include: bool) -> None:
    [choice] = pair.answer(COMPLETIONS, GREEDY | {"stop": stop, "include_stop_str_in_output": include})["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] in stop
    assert choice["text"].endswith(choice["stop_reason"]) == include
    assert sum(choice["text"].count(each) for each in ([stop] if isinstance(stop, str) else stop)) == include


@pytest.mark.parametrize("stop", [[SPACE], [17, ONE], [1648]])
def test_stop_tokens(pair: Pair, stop: list[int]) -> None:
    for request in (GREEDY, SEEDED, GREEDY | {"min_tokens": 10}):
        [choice] = pair.answer(COMPLETIONS, request | {"stop_token_ids": stop})["choices"]
        assert (choice["finish_reason"], choice["token_ids"][-1]) == ("stop", choice["stop_reason"])
        assert choice["stop_reason"] in stop
        assert not set(choice["token_ids"][:-1]) & set(stop)
        assert len(choice["token_ids"]) >= request.get("min_tokens", 0)


def test_end_of_sequence_ends_the_answer_and_is_not_shown(pair: Pair) -> None:
    """Twelve answers at once, so that ends fall on all places in a step."""

    def check(messages: list[dict[str, str]]) -> int:
        body = {"messages": messages, "temperature": 0, "max_tokens": 200, "return_token_ids": True}
        [choice] = pair.answer(CHAT, body)["choices"]
        content, ids = choice["message"]["content"], choice["token_ids"]
        assert "</s>" not in content
        assert EOS not in ids[:-1]
        assert (choice["finish_reason"] == "stop") == (ids[-1] == EOS)
        return int(ids[-1] == EOS)

    assert sum(at_once(check, chats(12))) >= 10


def test_ignore_eos_goes_on(pair: Pair) -> None:
    [choice] = pair.answer(COMPLETIONS, GREEDY | {"ignore_eos": True, "max_tokens": 120})["choices"]
    assert len(choice["token_ids"]) == 120
    assert EOS in choice["token_ids"][:-1]


@pytest.mark.parametrize("request_", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_min_tokens_keeps_the_end_away(pair: Pair, request_: dict[str, object]) -> None:
    [choice] = pair.answer(COMPLETIONS, request_ | {"min_tokens": 100, "max_tokens": 120})["choices"]
    assert EOS not in choice["token_ids"][:99]
    assert len(choice["token_ids"]) >= 100
    [choice] = pair.answer(COMPLETIONS, request_ | {"min_tokens": 30, "stop": ["pencils"]})["choices"]
    assert len(choice["token_ids"]) >= 30


def test_stop_string_in_one_of_several_samples(pair: Pair) -> None:
    choices = pair.answer(COMPLETIONS, SEEDED | {"prompt": PROMPT, "n": 4, "stop": ["the", "$"], "max_tokens": 60})["choices"]
    assert len({len(choice["token_ids"]) for choice in choices}) > 1
    chat = pair.answer(CHAT, {"messages": MESSAGES, "seed": 3, "n": 3, "stop": ["."], "max_tokens": 60})["choices"]
    assert all("." not in choice["message"]["content"] for choice in chat)
