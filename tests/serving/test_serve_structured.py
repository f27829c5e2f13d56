"""Structured output over HTTP: valid, and that of the server without trees, alone, streamed and among free requests."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, Field

from tests.serving.server import Pair, assert_alike, at_once
from tests.serving.serving_requests import CHAT, COMPLETIONS, MESSAGES, chats
from tests.serving.test_serve_streams import in_one_piece, joined


class Item(BaseModel, extra="forbid"):
    kind: str = Field(pattern="^(pencil|box)$")
    count: int = Field(ge=0, le=99)


class Purchase(BaseModel, extra="forbid"):
    buyer: str = Field(max_length=12)
    items: list[Item] = Field(min_length=1, max_length=2)
    paid: bool


SCHEMA = {"type": "json_schema", "json_schema": {"name": "purchase", "schema": Purchase.model_json_schema(), "strict": True}}
AMOUNT = r"\d{2,4} (pencils|boxes), total \$\d{1,3}\.\d{2}"
CHOICES = ["yes, he does", "yes, he did", "no, he does not", "perhaps"]
SUM = 'root ::= term (" + " term){2,5} " = " number\nterm ::= number | "(" term " + " term ")"\nnumber ::= [0-9]{1,3}'
# `"` and `}` are made likely, so that the object ends.
ENDING = {"logit_bias": {"5": 6, "96": 12}}

# Name -> parameters of the request, and what raises for an answer that is not valid.
GRAMMARS: dict[str, tuple[dict[str, Any], Callable[[str], object]]] = {
    "json_schema": ({"response_format": SCHEMA}, Purchase.model_validate_json),
    "json_object": ({"response_format": {"type": "json_object"}} | ENDING, lambda text: json.loads(text).items()),
    "regex": ({"structured_outputs": {"regex": AMOUNT}}, lambda text: re.fullmatch(AMOUNT, text).group()),  # type: ignore[union-attr]
    "choice": ({"structured_outputs": {"choice": CHOICES}}, CHOICES.index),
    "grammar": ({"structured_outputs": {"grammar": SUM}}, lambda text: re.fullmatch(r"[0-9 +()]+ = \d{1,3}", text).group()),  # type: ignore[union-attr]
}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"seed": 3},
    "hot": {"seed": 5, "temperature": 1.5, "top_p": 0.95},
}


def body(name: str, sampling: dict[str, Any], messages: list[dict[str, str]] = MESSAGES) -> dict[str, Any]:
    """A chat request under the named grammar, with tokens enough to reach its end."""
    return {"messages": messages, "max_tokens": 120, "return_token_ids": True} | sampling | GRAMMARS[name][0]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", GRAMMARS)
def test_valid_and_that_of_the_plain_server(pair: Pair, name: str, sampling: str) -> None:
    [choice] = pair.answer(CHAT, body(name, SAMPLINGS[sampling]))["choices"]
    assert choice["finish_reason"] == "stop"
    GRAMMARS[name][1](choice["message"]["content"])


@pytest.mark.parametrize("name", GRAMMARS)
def test_streamed(pair: Pair, name: str) -> None:
    request = body(name, SAMPLINGS["seeded"])
    [found] = joined(pair.trees.stream(CHAT, request))
    assert_alike(in_one_piece(pair.plain, CHAT, request), [found])
    GRAMMARS[name][1](found["text"])


def test_among_free_requests(pair: Pair) -> None:
    """Every grammar, twice, and as many free requests in one batch; some with log-probabilities and penalties."""
    names = [name for name in GRAMMARS for _ in (0, 1)]
    extra: list[dict[str, Any]] = [{}, {"logprobs": True, "top_logprobs": 2}, {"frequency_penalty": 0.5}]

    def check(case: tuple[int, list[dict[str, str]]]) -> None:
        index, messages = case
        changes = {"seed": index, "temperature": index % 2} | extra[index % 3]
        if index % 2:
            pair.answer(CHAT, {"messages": messages, "max_tokens": 60} | changes)
        else:
            [choice] = pair.answer(CHAT, body(names[index // 2], changes, messages))["choices"]
            GRAMMARS[names[index // 2]][1](choice["message"]["content"])

    at_once(check, list(enumerate(chats(2 * len(names)))))


def test_several_samples_and_a_cut(pair: Pair) -> None:
    choices = pair.answer(CHAT, body("json_schema", {"seed": 1, "n": 3}))["choices"]
    assert len({Purchase.model_validate_json(choice["message"]["content"]).model_dump_json() for choice in choices}) > 1
    for max_tokens in (1, 7, 20):
        [choice] = pair.answer(CHAT, body("json_schema", {"temperature": 0}) | {"max_tokens": max_tokens})["choices"]
        assert choice["finish_reason"] == "length"
    [choice] = pair.answer(CHAT, body("json_schema", {"temperature": 0, "stop": ['"items"']}))["choices"]
    assert choice["stop_reason"] == '"items"'


@pytest.mark.parametrize(
    "bad",
    [
        {"regex": "("},
        {"grammar": "root ::= undefined"},
        {"json": {"type": "nope"}},
        {"choice": []},
        {"regex": "a", "choice": ["a"]},
    ],
)
def test_a_broken_grammar_is_refused_alike(pair: Pair, bad: dict[str, Any]) -> None:
    assert pair.post(COMPLETIONS, {"prompt": "a", "max_tokens": 4, "structured_outputs": bad}).status_code >= 400
    pair.answer(CHAT, body("choice", {"temperature": 0}))
