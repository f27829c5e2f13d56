"""Streamed answers: the pieces are the answer that comes in one piece."""

from typing import Any

import pytest

from tests.serving.server import Pair, Server, assert_alike
from tests.serving.serving_requests import CHAT, COMPLETIONS, GREEDY, MESSAGES, REQUESTS, SEEDED


def joined(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices that the events add up to; a choice must not go on after its end."""
    choices: dict[int, dict[str, Any]] = {}
    for piece in (choice for event in events for choice in event["choices"]):
        whole = choices.setdefault(piece["index"], {"text": "", "token_ids": [], "logprobs": [], "finish_reason": None})
        assert whole["finish_reason"] is None
        whole["text"] += piece["delta"].get("content") or "" if "delta" in piece else piece["text"]
        whole["token_ids"] += piece.get("token_ids") or []
        logprobs = piece["logprobs"] or {}
        whole["logprobs"] += logprobs.get("content") or logprobs.get("token_logprobs") or []
        whole |= {"finish_reason": piece["finish_reason"], "stop_reason": piece.get("stop_reason")}
    return [choices[index] for index in sorted(choices)]


def in_one_piece(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of the answer that is not streamed, in the form of `joined`."""
    found = []
    for choice in server.answer(path, body)["choices"]:
        logprobs = choice["logprobs"] or {}
        found.append(
            {
                "text": choice["message"]["content"] if "message" in choice else choice["text"],
                "token_ids": choice["token_ids"],
                "logprobs": logprobs.get("content") or logprobs.get("token_logprobs") or [],
                "finish_reason": choice["finish_reason"],
                "stop_reason": choice["stop_reason"],
            }
        )
    return found


STREAMED: dict[str, tuple[str, dict[str, Any]]] = {
    name: REQUESTS[name]
    for name in ("greedy", "seeded", "n", "several prompts", "all penalties and top_k, top_p, min_p", "chat", "chat, seeded")
} | {
    "stop string": (COMPLETIONS, GREEDY | {"stop": ["left after", "12-3"]}),
    "stop string kept": (COMPLETIONS, GREEDY | {"stop": ["pencils left"], "include_stop_str_in_output": True}),
    "stop token": (COMPLETIONS, SEEDED | {"stop_token_ids": [202]}),
    "logprobs": (COMPLETIONS, SEEDED | {"logprobs": 2}),
    "chat, logprobs": (CHAT, {"messages": MESSAGES, "seed": 2, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}),
    "ignore_eos": (COMPLETIONS, GREEDY | {"ignore_eos": True, "max_tokens": 100}),
    "chat, n": (CHAT, {"messages": MESSAGES, "seed": 2, "n": 3, "max_tokens": 40, "return_token_ids": True}),
}


@pytest.mark.parametrize("name", STREAMED)
def test_pieces_add_up_to_the_answer(pair: Pair, name: str) -> None:
    path, body = STREAMED[name]
    assert_alike(in_one_piece(pair.plain, path, body), joined(pair.trees.stream(path, body)))


def test_what_a_step_accepts_comes_in_one_event(pair: Pair) -> None:
    """Never more events than target passes; fewer where the server was slower than the engine and joined two."""
    events = pair.trees.stream(COMPLETIONS, GREEDY | {"max_tokens": 100, "stream_options": {"include_usage": True}})
    [metrics] = [event["metrics"] for event in events if event.get("metrics")]
    sizes = [len(choice["token_ids"]) for event in events for choice in event["choices"]]
    assert len(sizes) <= 1 + metrics["speculative_decoding"]["num_spec_steps"] < sum(sizes) / 2
    assert max(sizes) > 1


@pytest.mark.parametrize("name", ["seeded", "n", "chat"])
def test_usage_grows_to_that_of_the_answer(pair: Pair, name: str) -> None:
    path, body = STREAMED[name]
    *events, last = pair.trees.stream(path, body | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}})
    assert last["choices"] == []
    assert_alike(pair.plain.answer(path, body)["usage"] | last["usage"], last["usage"] | pair.plain.answer(path, body)["usage"])
    so_far = {choice["index"]: 0 for event in events for choice in event["choices"]}
    for event in events:
        for choice in event["choices"]:
            so_far[choice["index"]] += len(choice.get("token_ids") or [])
            assert event["usage"]["completion_tokens"] in (so_far[choice["index"]], sum(so_far.values()))
            assert event["usage"]["total_tokens"] == event["usage"]["prompt_tokens"] + event["usage"]["completion_tokens"]
    assert sum(so_far.values()) == last["usage"]["completion_tokens"]


def test_usage_only_when_asked_for(pair: Pair) -> None:
    assert all(event.get("usage") is None for event in pair.trees.stream(CHAT, STREAMED["chat"][1]))
    *events, last = pair.trees.stream(CHAT, STREAMED["chat"][1] | {"stream_options": {"include_usage": True}})
    assert all(event.get("usage") is None for event in events)
    assert last["usage"]["completion_tokens"] > 0


def test_several_steps_in_one_event(pair: Pair) -> None:
    path, body = STREAMED["greedy"]
    events = pair.trees.stream(path, body | {"stream_interval": 10})
    assert_alike(in_one_piece(pair.plain, path, body), joined(events))
    assert all(len(event["choices"][0]["token_ids"]) >= 10 for event in events[1:-1])
