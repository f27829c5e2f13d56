"""Servers with the parsers of other models: what they stream is what servers without trees stream."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.models import with_markers
from tests.serving.server import MODEL, TREES, Server, servers
from tests.serving.serving_requests import CHAT, MESSAGES
from tests.serving.test_serve_tools import TOOLS, deltas
from tests.tiers import exhaustive
from vllm_eagle.pair import TARGET

pytestmark = exhaustive  # each case starts two servers; test_streams.py has all parsers, without servers

CALL = (
    "<tool_call>\n<function=add>\n<parameter=a>\n3\n</parameter>\n<parameter=b>\n14\n</parameter>\n</function>\n</tool_call>\nDone."
)
THOUGHTS = "Here is my thought process: Tom buys four boxes. Here is my response: He has 36 pencils."
TOOL_PARSER = ("--enable-auto-tool-choice", "--tool-call-parser", "qwen3_coder")
CASES: dict[str, tuple[tuple[str, ...], str]] = {
    "qwen3_coder": (TOOL_PARSER, CALL),
    "granite": (("--reasoning-parser", "granite"), THOUGHTS),
    "qwen3 and qwen3_coder": (("--reasoning-parser", "qwen3", *TOOL_PARSER), f"<think>\nI add.\n</think>\n\n{CALL}"),
}


def responses(server: Server, body: Mapping[str, Any]) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Of /v1/responses: deltas of each kind, those in a row as one, and what the last event says of all."""
    pieces: list[list[str]] = []
    with server.http.stream("POST", "/v1/responses", json={"model": MODEL, "stream": True, **body}) as response:
        assert response.status_code == 200, response.read()[:500]
        events = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line.startswith("data: {")]
    for event in events:
        if not isinstance(event.get("delta"), str):
            continue
        if not pieces or pieces[-1][0] != event["type"]:
            pieces.append([event["type"], ""])
        pieces[-1][1] += event["delta"]
    assert events[-1]["type"] == "response.completed"
    own = {"id", "call_id"}
    return pieces, [{key: value for key, value in item.items() if key not in own} for item in events[-1]["response"]["output"]]


def messages(server: Server, body: Mapping[str, Any]) -> tuple[list[list[str]], str]:
    """Of /v1/messages: kind, name and joined deltas of each block of the answer, and why it ended."""
    blocks: list[list[str]] = []
    with server.http.stream("POST", "/v1/messages", json={"model": MODEL, "stream": True, **body}) as response:
        assert response.status_code == 200, response.read()[:500]
        events = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line.startswith("data: {")]
    ended = ""
    for event in events:
        if event["type"] == "content_block_start":
            block = event["content_block"]
            blocks.append([block["type"], block.get("name") or "", ""])
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            blocks[event["index"]][2] += delta.get("text") or delta.get("thinking") or delta.get("partial_json") or ""
        elif event["type"] == "message_delta":
            ended = event["delta"]["stop_reason"]
    assert events[-1]["type"] == "message_stop"
    return blocks, ended


@pytest.mark.parametrize("name", CASES)
def test_streams_add_up_to_those_without_trees(name: str, tmp_path: Path) -> None:
    parsers, text = CASES[name]
    target = with_markers(TARGET, tmp_path / "target", "<think>", "</think>", "<tool_call>", "</tool_call>")
    options = (*parsers, "--structured-outputs-config", '{"backend": "xgrammar", "enable_in_reasoning": true}')
    dictated = {"structural_tag": json.dumps({"type": "structural_tag", "format": {"type": "const_string", "value": text}})}
    with servers(tmp_path, options, (*options, *TREES, "--per-request-spec-decode-metrics", "summary"), model=target) as (
        plain,
        trees,
    ):
        chat = {"messages": MESSAGES, "temperature": 0, "structured_outputs": dictated, "stream_options": {"include_usage": True}}
        asked = {"input": "Add.", "temperature": 0, "max_output_tokens": 200, "structured_outputs": dictated}
        if "--tool-call-parser" in parsers:
            chat["tools"] = TOOLS
            asked["tools"] = [{"type": "function", **tool["function"]} for tool in TOOLS]
        found, other = trees.stream(CHAT, chat), responses(trees, asked)
        assert found[-1]["metrics"]["speculative_decoding"]["mean_acceptance_length"] > 1.5
        # Asked again where a busy machine made vLLM join tokens, which its parsers read as wrongly without trees.
        assert any(deltas(plain.stream(CHAT, chat)) == deltas(found) for _ in range(3))
        assert any(responses(plain, asked) == other for _ in range(3))
        assert deltas(found)["calls"] or deltas(found)["reasoning"]  # something was parsed
        # This one takes no grammar from the client; the choice of a tool is one.
        body: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": 200}
        if "--tool-call-parser" in parsers:
            body["tools"] = [{"name": t["function"]["name"], "input_schema": t["function"]["parameters"]} for t in TOOLS]
            body["tool_choice"] = {"type": "tool", "name": "add"}
        blocks, ended = messages(trees, body)
        assert any(messages(plain, body) == (blocks, ended) for _ in range(3))
        assert ("tool_use" in [kind for kind, _, _ in blocks]) == ("--tool-call-parser" in parsers)
