"""Tool calls: grammars that start in the middle of an answer, and arguments that must be JSON of the tool's schema."""

import json
from typing import Any

import pytest

from tests.serving.server import Pair, assert_alike
from tests.serving.serving_requests import CHAT, MESSAGES

NUMBER = {"type": "integer", "minimum": 0, "maximum": 999}


def tool(name: str, properties: dict[str, Any]) -> dict[str, Any]:
    """A tool with these arguments, all required. `strict` holds the model to them."""
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "strict": True, "parameters": schema}}


TOOLS = [tool("add", {"a": NUMBER, "b": NUMBER}), tool("say", {"text": {"type": "string", "maxLength": 10}})]
NAMED = {"type": "function", "function": {"name": "add"}}
SAMPLINGS = {"greedy": {"temperature": 0}, "seeded": {"seed": 5}}


def body(tool_choice: str | dict[str, Any], sampling: str) -> dict[str, Any]:
    return {
        "messages": MESSAGES,
        "tools": TOOLS,
        "tool_choice": tool_choice,
        "parallel_tool_calls": False,
        "max_tokens": 120,
        "return_token_ids": True,
    } | SAMPLINGS[sampling]


def check_call(call: dict[str, Any]) -> None:
    """The arguments are those that the named tool takes."""
    arguments = json.loads(call["arguments"])
    if call["name"] == "add":
        assert arguments.keys() == {"a", "b"}
        assert all(isinstance(value, int) and 0 <= value <= 999 for value in arguments.values())
    else:
        assert call["name"] == "say"
        assert arguments.keys() == {"text"}
        assert len(arguments["text"]) <= 10


def deltas(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client joins of a streamed chat with one choice; names of calls and their arguments."""
    found: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "ends": []}
    for choice in (choice for event in events for choice in event["choices"]):
        for name in ("content", "reasoning"):
            found[name] += choice["delta"].get(name) or ""
        for call in choice["delta"].get("tool_calls") or []:
            found["calls"] += [["", ""] for _ in range(call["index"] + 1 - len(found["calls"]))]
            for place, name in enumerate(("name", "arguments")):
                found["calls"][call["index"]][place] += call["function"].get(name) or ""
        found["ends"] += [choice["finish_reason"]] if choice["finish_reason"] else []
    return found


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("tool_choice", ["required", NAMED], ids=["required", "named"])
def test_a_call_with_valid_arguments(pair: Pair, tool_choice: str | dict[str, Any], sampling: str) -> None:
    [choice] = pair.answer(CHAT, body(tool_choice, sampling))["choices"]
    [call] = choice["message"]["tool_calls"]
    check_call(call["function"])
    assert tool_choice == "required" or call["function"]["name"] == "add"


@pytest.mark.parametrize("tool_choice", ["required", NAMED], ids=["required", "named"])
def test_a_streamed_call(pair: Pair, tool_choice: str | dict[str, Any]) -> None:
    request = body(tool_choice, "seeded")
    [whole] = pair.plain.answer(CHAT, request)["choices"][0]["message"]["tool_calls"]
    pieces = [
        call["function"]
        for event in pair.trees.stream(CHAT, request)
        for choice in event["choices"]
        for call in choice["delta"].get("tool_calls") or []
    ]
    names = [piece["name"] for piece in pieces if piece.get("name")]
    arguments = "".join(piece.get("arguments") or "" for piece in pieces)
    assert names == [whole["function"]["name"]]
    assert_alike(json.loads(whole["function"]["arguments"]), json.loads(arguments))


def test_what_is_parsed_is_streamed_as_without_trees(pair: Pair) -> None:
    """A call between words, which the grammar dictates. Each event has one token, though steps accept several."""
    text = 'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 14}}\n</tool_call>\nDone.'
    dictated = {"structural_tag": json.dumps({"type": "structural_tag", "format": {"type": "const_string", "value": text}})}
    request = body("auto", "greedy") | {"structured_outputs": dictated, "stream_options": {"include_usage": True}}
    del request["parallel_tool_calls"]
    expected, found = pair.plain.stream(CHAT, request), pair.trees.stream(CHAT, request)
    assert deltas(found) == deltas(expected)
    assert deltas(found)["calls"] == [["add", '{"a": 3, "b": 14}']]
    assert all(len(choice.get("token_ids") or []) <= 1 for event in found for choice in event["choices"])
    steps = found[-1]["metrics"]["speculative_decoding"]["num_spec_steps"]
    assert steps < found[-1]["usage"]["completion_tokens"] / 2


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_without_a_call(pair: Pair, sampling: str) -> None:
    """Asked nothing of the kind, the small model answers in words; several calls until it runs out of tokens stay text, too."""
    for tool_choice in ("auto", "none"):
        [choice] = pair.answer(CHAT, body(tool_choice, sampling))["choices"]
        assert choice["message"]["content"]
        assert not choice["message"].get("tool_calls")
    pair.answer(CHAT, body("required", sampling) | {"parallel_tool_calls": True, "max_tokens": 60})


def test_an_unknown_tool_is_refused_alike(pair: Pair) -> None:
    assert pair.post(CHAT, body({"type": "function", "function": {"name": "other"}}, "greedy")).status_code == 400
