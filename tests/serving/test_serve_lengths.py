"""Prompts near max_model_len: a tree that does not fit is cut, an answer never is."""

import pytest

from tests.serving.server import MAX_MODEL_LEN, Pair, at_once
from tests.serving.serving_requests import COMPLETIONS

DEPTH, TREE = 8, 16  # of the server's trees: levels, and nodes besides the root
PROMPT = [5 + i * 37 % 4000 for i in range(MAX_MODEL_LEN + 2)]
ROOM = [1, 2, 3, DEPTH, DEPTH + 1, TREE, TREE + 1, TREE + 2, 2 * TREE + 1]


@pytest.mark.parametrize("room", ROOM)
def test_the_answer_fills_what_is_left(pair: Pair, room: int) -> None:
    body = {"prompt": PROMPT[: MAX_MODEL_LEN - room], "ignore_eos": True, "return_token_ids": True, "logprobs": 1}
    for request in ({"temperature": 0, "max_tokens": 100}, {"temperature": 1, "seed": room, "max_tokens": room}):
        [choice] = pair.answer(COMPLETIONS, body | request)["choices"]
        assert len(choice["token_ids"]) == room
        assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("room", [0, -1, -2])
def test_no_room_is_refused_alike(pair: Pair, room: int) -> None:
    assert pair.post(COMPLETIONS, {"prompt": PROMPT[: MAX_MODEL_LEN - room], "max_tokens": 4}).status_code == 400


def test_one_at_the_limit_does_not_slow_the_others(pair: Pair) -> None:
    """Requests with no room for a tree, in one batch with some that have it."""

    def check(room: int) -> None:
        body = {"prompt": PROMPT[room : room + 20] if room % 2 else PROMPT[: MAX_MODEL_LEN - room]}
        pair.answer(
            COMPLETIONS, body | {"temperature": 1, "seed": room, "max_tokens": 40, "ignore_eos": True, "return_token_ids": True}
        )

    at_once(check, ROOM)
