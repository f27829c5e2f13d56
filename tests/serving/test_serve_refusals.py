"""What vLLM refuses, it refuses with trees in the same words, and goes on answering; what it offers besides is still there."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.server import MAX_MODEL_LEN, Pair
from tests.serving.serving_requests import CHAT, COMPLETIONS, MESSAGES

# Parameters and values that no prompt can be sent with.
IMPOSSIBLE: list[tuple[str, Any]] = [
    *[("prompt", [5, -1]), ("prompt", [5, 4096]), ("prompt", [5, 1 << 40]), ("prompt", [5, "a"]), ("prompt", [1.5])],
    *[("prompt", ""), ("prompt", []), ("prompt", [[]]), ("prompt", None), ("prompt", {"a": 1})],
    *[("max_tokens", 0), ("max_tokens", -1), ("max_tokens", "x"), ("max_tokens", MAX_MODEL_LEN + 1)],
    *[("temperature", -1), ("temperature", "hot")],
    *[("top_p", 2), ("top_k", -5), ("min_p", 2), ("n", 0), ("repetition_penalty", -1), ("presence_penalty", 9)],
    *[("stop", [""]), ("stop", 5), ("min_tokens", 50), ("seed", "x"), ("logprobs", -2), ("logprobs", 21), ("suffix", "b")],
    *[("allowed_token_ids", []), ("allowed_token_ids", [9999]), ("bad_words", [""])],
    *[("logit_bias", {"x": 1}), ("logit_bias", {"4096": 1}), ("stream_options", {"include_usage": True})],
    *[("response_format", {"type": "json_schema"}), ("stream", "perhaps"), ("prompt_logprobs", 99)],
]
# Name -> path and body.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name}={value}": (COMPLETIONS, {"prompt": "a", name: value}) for name, value in IMPOSSIBLE},
    "greedy n": (COMPLETIONS, {"prompt": "a", "temperature": 0, "n": 2}),
    "unknown model": (COMPLETIONS, {"prompt": "a", "model": "other"}),
    "long prompt": (COMPLETIONS, {"prompt": [5] * (MAX_MODEL_LEN + 1)}),
    "no messages": (CHAT, {}),
    "empty conversation": (CHAT, {"messages": []}),
    "top_logprobs alone": (CHAT, {"messages": MESSAGES, "top_logprobs": 3}),
    "image": (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]}),
    "embeddings": ("/v1/embeddings", {"input": "a"}),
}


@pytest.fixture(autouse=True)
def goes_on_answering(pair: Pair) -> Iterator[None]:
    yield
    pair.trees.answer(COMPLETIONS, {"prompt": "a", "max_tokens": 1})


@pytest.mark.parametrize("name", REFUSED)
def test_refused_alike(pair: Pair, name: str) -> None:
    assert 400 <= pair.post(*REFUSED[name]).status_code < 500


def test_what_is_no_json(pair: Pair) -> None:
    for content, kind in ((b"{", "json"), (b"[1]", "json"), (b"\xff\x00", "json"), (b"{}", "pdf")):
        headers = {"content-type": f"application/{kind}"}
        plain, trees = (server.http.post(COMPLETIONS, content=content, headers=headers) for server in (pair.plain, pair.trees))
        assert (trees.status_code, trees.text) == (plain.status_code, plain.text)
        assert 400 <= trees.status_code < 500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eagle_topk": 99}, "eagle_topk=99 is not possible here; set eagle_topk to an integer from 1 to 16"),
        ({"eagle_num_draft_tokens": "4"}, "eagle_num_draft_tokens='4'"),
        ({"eagle_nodes": 3}, "known ones: eagle_num_draft_tokens, eagle_max_depth, eagle_topk"),
    ],
)
def test_impossible_tree_options_are_the_clients_mistake(pair: Pair, options: dict[str, Any], message: str) -> None:
    response = pair.trees.post(COMPLETIONS, {"prompt": "a", "vllm_xargs": options})
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/models", "/version", "/health", "/ping", "/load", "/nowhere", COMPLETIONS])
def test_other_pages(pair: Pair, path: str) -> None:
    plain, trees = pair.plain.http.get(path), pair.trees.http.get(path)
    assert trees.status_code == plain.status_code
    assert trees.status_code == {"/nowhere": 404, COMPLETIONS: 405}.get(path, 200)
    assert path == "/v1/models" or trees.text == plain.text


def test_tokenize(pair: Pair) -> None:
    for body in ({"prompt": "Tom has 12 pencils."}, {"messages": MESSAGES}):
        ids = pair.answer("/tokenize", body)["tokens"]
        assert "pencils" in pair.answer("/detokenize", {"tokens": ids})["prompt"]
