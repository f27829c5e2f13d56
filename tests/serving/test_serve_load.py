"""Many clients at once on a cache that is too small for them, and clients that leave."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from tests.serving.server import MODEL, Pair, Server, assert_alike, at_once
from tests.serving.serving_requests import CHAT, COMPLETIONS, REQUESTS, chats


@pytest.fixture(autouse=True)
def nothing_is_left_behind(pair: Pair) -> Iterator[None]:
    yield
    assert_idle(pair.trees)


def assert_idle(server: Server, seconds: float = 20) -> None:
    """No request runs or waits and no cache block is held, at the latest after some seconds."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    deadline = time.monotonic() + seconds
    while True:
        metrics = server.metrics()
        if not any(metrics[name] for name in names):
            return
        assert time.monotonic() < deadline, {name: metrics[name] for name in names}
        time.sleep(0.2)


def test_all_parameters_at_once_under_preemption(pair: Pair) -> None:
    """All requests of the table and as many questions, together, get the answers that they get alone."""
    mixed = [request for name, request in REQUESTS.items() if "beam" not in name]
    mixed += [
        (CHAT, {"messages": messages, "seed": seed, "temperature": seed % 3 / 2, "max_tokens": 100, "return_token_ids": True})
        for seed, messages in enumerate(chats(12))
    ]
    expected = [pair.plain.answer(*request) for request in mixed]
    before = pair.trees.metrics()["vllm:num_preemptions_total"]
    found = at_once(lambda request: pair.trees.answer(*request), mixed)
    assert pair.trees.metrics()["vllm:num_preemptions_total"] > before
    for one, other in zip(expected, found, strict=True):
        assert_alike(one, other)


def test_built_in_questions(pair: Pair) -> None:
    """Greedy answers, sixteen at a time, with the prefix cache warm for some of them."""

    def answer(server: Server, messages: list[dict[str, str]]) -> Any:
        return server.answer(CHAT, {"messages": messages, "temperature": 0, "max_tokens": 128, "return_token_ids": True})

    questions = chats(16)
    expected = at_once(lambda messages: answer(pair.plain, messages), questions)
    for asked in (questions, questions[::-1]):
        found = at_once(lambda messages: answer(pair.trees, messages), asked)
        assert_alike(expected, found if asked is questions else found[::-1])


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
def test_clients_that_leave(pair: Pair, streamed: bool) -> None:
    """They leave no request and no cache block, and those that stay get what is theirs."""
    # Eight long answers each, many times what the cache holds: nobody is served before all have left.
    body = {"model": MODEL, "temperature": 1, "seed": 1, "n": 8, "max_tokens": 450, "ignore_eos": True, "stream": streamed}
    stay = {"prompt": "Once upon a time", "seed": 2, "max_tokens": 60, "return_token_ids": True}
    with ExitStack() as stack:
        for i in range(6):
            client = stack.enter_context(httpx.Client(base_url=pair.trees.url, timeout=60))
            if streamed:
                response = stack.enter_context(client.stream("POST", COMPLETIONS, json=body | {"prompt": [10 + i, 20, 30]}))
                lines = response.iter_lines()
                assert all("text" in next(line for line in lines if line) for _ in range(1 + i))
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(COMPLETIONS, json=body | {"prompt": [10 + i, 20, 30]}, timeout=0.2)
        assert not streamed or pair.trees.metrics()["vllm:num_requests_running"] > 0
        found = pair.trees.answer(COMPLETIONS, stay) if streamed else None
    assert_alike(pair.plain.answer(COMPLETIONS, stay), found or pair.trees.answer(COMPLETIONS, stay))
    assert_idle(pair.trees)
