"""Streams that are parsed: whatever a step accepts, vLLM's parsers see what single tokens would have given them."""

import ast
import asyncio
import json
import random
import re
from collections.abc import AsyncGenerator
from functools import cache
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import vllm
from tokenizers import AddedToken
from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.responses.context import SimpleContext
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.outputs import RequestOutput
from vllm.parser import ParserManager
from vllm.reasoning import ReasoningParserManager
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tool_parsers import ToolParserManager
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.outputs import LogprobsLists

from tests.serving.fake_engine import Engine
from tests.serving.parser_texts import ARGUMENTS, TEXTS
from tests.serving.test_serve_tools import deltas
from tests.tiers import some
from vllm_eagle import plugin
from vllm_eagle.pair import TARGET
from vllm_eagle.serving.streams import chat_by_token, responses_by_token

LONGEST = 9  # tokens of a step
PROMPT = [0, 2, 300, 3]
WORDS = "Tom has 36 pencils 🙂 and 12-3 left.\nSo 9 are gone, é è ü, all of them. A pencil is left after that."


# ---- the tokenizer: the shipped one, with the markers of all of vLLM's parsers

_MARKER = re.compile(r"</?[^<>\s\\(){}*?'$=]{1,40}>|\[/?[A-Z_]+\]|◁[^◁▷]*▷")


@cache
def tokenizer() -> Any:
    folders = [Path(vllm.__file__).parent / folder for folder in ("tool_parsers", "reasoning", "parser")]
    sources = [ast.parse(path.read_text()) for folder in folders for path in folder.rglob("*.py")]
    constants = [node.value for source in sources for node in ast.walk(source) if isinstance(node, ast.Constant)]
    found = AutoTokenizer.from_pretrained(TARGET)
    markers = {text for text in constants if isinstance(text, str) and _MARKER.fullmatch(text)}
    markers |= {"Ġ</", "think"}  # which olmo3 asks for
    added = sorted(markers - found.get_vocab().keys())
    found.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in added])
    return found


@cache
def token_ids(text: str) -> list[int]:
    found: list[int] = tokenizer().encode(text, add_special_tokens=False)
    return found


# ---- what vLLM makes of the tokens of each step


def chat(**changes: Any) -> Any:
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
        for name, properties in (
            ("add", {"a": {"type": "integer"}, "b": {"type": "integer"}}),
            ("say", {"text": {"type": "string"}}),
        )
    ]
    settings = {"model": "m", "messages": [{"role": "user", "content": "?"}], "tools": tools, "skip_special_tokens": False}
    return ChatCompletionRequest(**settings | {"stream": True} | changes)


def outputs(
    runs: list[list[int]], request: Any, end: FinishReason = FinishReason.LENGTH, logprobs: bool = False
) -> list[RequestOutput]:
    """Of a request whose steps accept these tokens."""
    params = SamplingParams(
        max_tokens=None,
        stop=request.stop,
        min_tokens=request.min_tokens,
        include_stop_str_in_output=request.include_stop_str_in_output,
        skip_special_tokens=request.skip_special_tokens,
        logprobs=1 if logprobs else None,
        output_kind=RequestOutputKind.DELTA,
    )
    processor = OutputProcessor(tokenizer(), log_stats=False)
    processor.add_request(EngineCoreRequest("r", PROMPT, None, params, None, 0.0, None, None, None, external_req_id="r"), "?")
    found: list[RequestOutput] = []
    for i, run in enumerate(runs):
        step = EngineCoreOutput("r", list(run))
        if i == len(runs) - 1:
            step.finish_reason, step.stop_reason = end, run[-1] if end == FinishReason.STOP else None
        if logprobs:
            ids = np.array([[token, 5] for token in run])
            step.new_logprobs = LogprobsLists(ids, -0.25 * (ids % 7), np.ones(len(run), dtype=int))
        found += processor.process_outputs([step]).request_outputs
    return found


def runs_of(tokens: list[int], seed: int) -> list[list[int]]:
    """As trees may accept them; the first comes alone, from the prompt."""
    rng, runs, start = random.Random(seed), [tokens[:1]], 1
    while start < len(tokens):
        end = start + rng.randint(1, LONGEST)
        runs.append(tokens[start:end])
        start = end
    return runs


def serving(tree_mode: bool = True, **changes: Any) -> Any:
    """What the seam reads of vLLM's OpenAIServingChat and OpenAIServingResponses."""
    engine = SimpleNamespace(vllm_config=Engine(tree_mode).vllm_config)
    return SimpleNamespace(
        **{"parser_cls": object, "renderer": SimpleNamespace(tokenizer=tokenizer()), "engine_client": engine} | changes
    )


async def _stream(found: list[Any]) -> AsyncGenerator[Any, None]:
    for each in found:
        yield each


def through_the_seam(found: list[RequestOutput], request: Any, **changes: Any) -> list[RequestOutput]:
    """What vLLM's chat server gets of them."""

    async def received() -> list[RequestOutput]:
        return [
            each async for each in chat_by_token(lambda self, request, found: found, serving(**changes), request, _stream(found))
        ]

    return asyncio.run(received())


# ---- outputs


STOPS: dict[str, tuple[dict[str, Any], FinishReason]] = {
    "length": ({}, FinishReason.LENGTH),
    "stop token": ({}, FinishReason.STOP),
    "stop string": ({"stop": ["left after", "12-3 le"]}, FinishReason.LENGTH),
    "stop string kept": ({"stop": "are gone", "include_stop_str_in_output": True}, FinishReason.LENGTH),
    "stop string that never comes": ({"stop": ["nowhere to be found"]}, FinishReason.LENGTH),
    "stop string, min_tokens": ({"stop": ["pencil"], "min_tokens": 20}, FinishReason.LENGTH),
}


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("name", STOPS)
def test_outputs_are_those_of_single_tokens(name: str, logprobs: bool) -> None:
    changes, end = STOPS[name]
    tokens = token_ids(WORDS)
    one_by_one = outputs([[token] for token in tokens], chat(**changes), end, logprobs)
    for seed in range(20):
        found = through_the_seam(outputs(runs_of(tokens, seed), chat(**changes), end, logprobs), chat(**changes))
        assert [each.finished for each in found] == [each.finished for each in one_by_one]
        for one, other in zip((each.outputs[0] for each in one_by_one), (each.outputs[0] for each in found), strict=True):
            other.cumulative_logprob = one.cumulative_logprob  # of the step; vLLM's server does not read it
            assert other == one


def test_choices_are_cut_apart() -> None:
    """vLLM joins outputs that wait for a slow server; those of several choices come as one."""
    tokens = token_ids(WORDS)
    first, second = outputs(runs_of(tokens, 1), chat()), outputs(runs_of(tokens, 2), chat())
    joined = []
    for one, other in zip(first, second, strict=False):
        other.outputs[0].index = 1
        one.add(other, aggregate=True)
        joined.append(one)
    found = [each.outputs for each in through_the_seam(joined, chat())]
    assert all(len(choices) == 1 for choices in found)
    for index in (0, 1):
        pieces = [choice for [choice] in found if choice.index == index]
        assert all(len(piece.token_ids) == 1 for piece in pieces)
        assert WORDS.startswith("".join(piece.text for piece in pieces))
        assert [*chain.from_iterable(piece.token_ids for piece in pieces)] == tokens[: len(pieces)]


def test_other_requests_keep_whole_steps() -> None:
    found = outputs(runs_of(token_ids(WORDS), 0), chat())
    assert through_the_seam(found, chat(), parser_cls=None) == found
    assert through_the_seam(found, chat(), tree_mode=False) == found
    assert through_the_seam(found, chat(use_beam_search=True)) == found
    assert len(through_the_seam(found, chat())) == len(token_ids(WORDS))


def test_a_client_that_leaves_aborts_its_request_at_once() -> None:
    aborted = []

    async def engine_outputs() -> AsyncGenerator[RequestOutput, None]:
        try:
            for each in outputs(runs_of(token_ids(WORDS), 0), chat()):
                yield each
        finally:
            aborted.append(True)

    async def leave() -> None:
        found = chat_by_token(lambda self, request, found: found, serving(), chat(), engine_outputs())
        for _ in range(3):
            await anext(found)
        assert not aborted
        await found.aclose()
        assert aborted

    asyncio.run(leave())


def test_responses_count_whole_steps_and_show_tokens() -> None:
    tokens = token_ids(WORDS)
    found = outputs(runs_of(tokens, 3), chat())
    context = SimpleContext(response_parser=object())

    async def contexts() -> AsyncGenerator[SimpleContext, None]:
        for each in found:
            context.append_output(each)
            yield context

    async def shown() -> list[Any]:
        cut = responses_by_token(
            lambda self, request, params, found, context: found, serving(), None, SamplingParams(), contexts(), context
        )
        return [each.last_output.outputs[0] async for each in cut]

    pieces = asyncio.run(shown())
    assert [piece.token_ids for piece in pieces] == [[token] for token in tokens]
    assert "".join(piece.text for piece in pieces) == WORDS
    assert context.last_output is found[-1]
    assert (context._accumulated_text, context.num_output_tokens) == (WORDS, len(tokens))


# ---- parsers

TOOLS, THOUGHTS = sorted(ToolParserManager.lazy_parsers), sorted(ReasoningParserManager.lazy_parsers)
PARSERS = [
    *((name, None) for name in TOOLS),
    *((None, name) for name in THOUGHTS),
    *((name, name) for name in TOOLS if name in THOUGHTS),
    ("hermes", "deepseek_r1"),
    ("openai", "openai_gptoss"),
]
DEFAULT = [
    ("hermes", None),
    ("qwen3_coder", None),
    ("jamba", None),
    (None, "granite"),
    (None, "deepseek_r1"),
    ("ernie45", "ernie45"),
]


def parser_cls(tool: str | None, reasoning: str | None) -> Any:
    """The class; skips the test if it cannot be had here."""
    try:
        found = ParserManager.get_parser(tool, reasoning, enable_auto_tools=True, is_harmony="openai" in (tool or reasoning or ""))
        found(tokenizer(), chat().tools)
    except Exception as error:
        pytest.skip(f"vLLM cannot make it with a tokenizer like this: {type(error).__name__}: {error}")
    return found


def parsed(parser: Any, found: list[RequestOutput], request: Any) -> dict[str, Any]:
    """What a client joins of the deltas."""
    answer: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}}
    for output in found:
        [piece] = output.outputs
        try:
            delta = parser.parse_delta(
                piece.text, list(piece.token_ids), request, output.prompt_token_ids, finished=piece.finish_reason is not None
            )
        except Exception as error:  # which ends the stream
            return answer | {"error": type(error).__name__}
        if delta is None:
            continue
        answer["content"] += delta.content or ""
        answer["reasoning"] += delta.reasoning or ""
        for call in delta.tool_calls or []:
            whole = answer["calls"].setdefault(call.index, {"ids": 0, "name": "", "arguments": ""})
            whole["ids"] += call.id is not None
            if call.function is not None:
                whole["name"] += call.function.name or ""
                whole["arguments"] += call.function.arguments or ""
    return answer


@cache
def single(text: str) -> list[RequestOutput]:
    return outputs([[token] for token in token_ids(text)], chat())


@cache
def cut(text: str, seed: int) -> list[RequestOutput]:
    return through_the_seam(outputs(runs_of(token_ids(text), seed), chat()), chat())


@pytest.mark.parametrize(("tool", "reasoning"), some(PARSERS, *DEFAULT))
def test_parsers_give_what_single_tokens_give(tool: str | None, reasoning: str | None) -> None:
    made, request = parser_cls(tool, reasoning), chat()
    for seed, (name, text) in enumerate(TEXTS.items()):
        expected, found = (parsed(made(tokenizer(), request.tools), stream, request) for stream in (single(text), cut(text, seed)))
        assert found == expected, name


NAMED = {"type": "function", "function": {"name": "add"}}
REQUIRED = f'[{{"name": "add", "parameters": {ARGUMENTS}}}, {{"name": "say", "parameters": {{"text": "hi"}}}}]'


@pytest.mark.parametrize(
    ("tool_choice", "text"),
    [("none", TEXTS["an array in tags"]), ("required", REQUIRED), (NAMED, ARGUMENTS)],
    ids=["none", "required", "named"],
)
def test_tool_choices_give_what_single_tokens_give(tool_choice: Any, text: str) -> None:
    made, request = parser_cls("jamba", None), chat(tool_choice=tool_choice)
    expected = parsed(made(tokenizer(), request.tools), single(text), request)
    assert bool(expected["calls"]) == (tool_choice != "none")
    for seed in range(5):
        assert parsed(made(tokenizer(), request.tools), cut(text, seed), request) == expected


# ---- what clients get, without an engine


@pytest.fixture
def prepared() -> None:
    plugin._prepare_server(Engine().vllm_config)


CASES = [
    ("qwen3_coder", None, "functions and parameters"),
    (None, "granite", "thoughts in words"),
    ("qwen3_coder", "qwen3", "think and a call"),
]
cases = pytest.mark.parametrize(("tool", "reasoning", "text"), [(tool, reasoning, TEXTS[name]) for tool, reasoning, name in CASES])


@cases
def test_chats_are_streamed_as_without_trees(prepared: None, tool: str | None, reasoning: str | None, text: str) -> None:
    made, request = parser_cls(tool, reasoning), chat(stream_options={"include_usage": True}, return_token_ids=True)
    server = OpenAIServingChat.__new__(OpenAIServingChat)
    vars(server).update(
        **dict.fromkeys(("model_config", "request_logger", "system_fingerprint")),
        **dict.fromkeys(("enable_force_include_usage", "enable_log_outputs", "enable_prompt_tokens_details"), False),
        enable_per_request_metrics=False,
        enable_auto_tools=tool is not None,
        response_role="assistant",
        parser_cls=made,
        _include_reasoning_tokens_details=reasoning is not None,
    )

    def events(found: list[RequestOutput], trees: bool) -> list[dict[str, Any]]:
        vars(server).update(vars(serving(tree_mode=trees)) | {"parser_cls": made})

        async def sent() -> list[str]:
            metadata = SimpleNamespace()
            chunks = server.chat_completion_stream_generator(request, _stream(found), "id", "m", [], tokenizer(), metadata)
            return [chunk.removeprefix("data: ") async for chunk in chunks]

        *data, done = asyncio.run(sent())
        assert done.startswith("[DONE]")
        return [json.loads(each) for each in data]

    expected = events(single(text), trees=False)
    for seed in range(5):
        found = events(outputs(runs_of(token_ids(text), seed), chat()), trees=True)
        assert deltas(found) == deltas(expected)
        assert [event["choices"][0].get("token_ids") for event in found[:-1]] == [
            event["choices"][0].get("token_ids") for event in expected[:-1]
        ]
        assert found[-1]["usage"] == expected[-1]["usage"]


@cases
def test_responses_are_streamed_as_without_trees(prepared: None, tool: str | None, reasoning: str | None, text: str) -> None:
    made = parser_cls(tool, reasoning)
    tools = [{"type": "function", "name": each.function.name, "parameters": each.function.parameters} for each in chat().tools]
    request, params = ResponsesRequest(model="m", input="?", tools=tools, stream=True), SamplingParams(skip_special_tokens=False)
    server = OpenAIServingResponses.__new__(OpenAIServingResponses)

    def events(found: list[RequestOutput], trees: bool) -> list[tuple[str, str]]:
        vars(server).update(vars(serving(tree_mode=trees)))
        context = SimpleContext(response_parser=made(tokenizer(), request.tools))

        async def contexts() -> AsyncGenerator[SimpleContext, None]:
            for each in found:
                context.append_output(each)
                yield context

        async def sent() -> list[tuple[str, str]]:
            called = (request, params, contexts(), context, "m", tokenizer(), None, 0, lambda event: event)
            return [(each.type, getattr(each, "delta", "")) async for each in server._process_simple_streaming_events(*called)]

        return asyncio.run(sent())

    expected = events(single(text), trees=False)
    for seed in range(5):
        assert events(outputs(runs_of(token_ids(text), seed), chat()), trees=True) == expected


def test_without_the_seam_a_parser_gives_something_else() -> None:
    """If this fails, vLLM's parsers may have learnt to read several tokens, and the seam may go."""
    made, request, text = parser_cls(None, "granite"), chat(), TEXTS["thoughts in words"]
    expected = parsed(made(tokenizer(), request.tools), single(text), request)
    found = [
        parsed(made(tokenizer(), request.tools), outputs(runs_of(token_ids(text), seed), request), request) for seed in range(10)
    ]
    assert expected["content"] == " He has 36 pencils."
    assert any(each != expected for each in found)
