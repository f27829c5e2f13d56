"""Streams whose answers are parsed, one token at a time whatever a step accepts.

vLLM's tool and reasoning parsers are written for deltas of one token. A tree gives several at once, and some parsers then lose
text beside a marker, or count it to the wrong side. So where a request has a parser, its outputs are cut into tokens before vLLM's
server sees them: it parses and sends what it would have sent without trees. All other requests keep whole steps, one event each.
"""

import copy
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

from vllm.outputs import CompletionOutput, RequestOutput, SamplingMask
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from vllm_eagle.options.devices import is_tree_mode

# What decides, beside the tokens, how much text each of them adds to a stream
_OF_TEXT = ("stop", "include_stop_str_in_output", "min_tokens", "skip_special_tokens", "spaces_between_special_tokens")
# What vLLM gives once, with the end of an answer
_AT_THE_END = ("finish_reason", "stop_reason", "routed_experts", "spec_decode_metrics", "weight_versions")


def chat_by_token(original: Callable[..., Any], self: Any, request: Any, result_generator: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the method of `OpenAIServingChat` that makes deltas of outputs, for Anthropic's and Cohere's APIs as well."""
    # A beam search gives its beams in one piece at the end, with and without trees.
    if self.parser_cls is not None and _has_trees(self) and not request.use_beam_search:
        result_generator = _outputs(result_generator, Cutter(self.renderer.tokenizer, request))
    return original(self, request, result_generator, *args, **kwargs)


def responses_by_token(
    original: Callable[..., Any],
    self: Any,
    request: Any,
    sampling_params: Any,
    result_generator: Any,
    context: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Around `OpenAIServingResponses._process_simple_streaming_events`."""
    if context.response_parser is not None and _has_trees(self):
        result_generator = _contexts(result_generator, Cutter(self.renderer.tokenizer, sampling_params))
    return original(self, request, sampling_params, result_generator, context, *args, **kwargs)


class Cutter:
    """Cuts the outputs of one streamed request."""

    def __init__(self, tokenizer: Any, request: Any):
        """`request` is what the client sent, or vLLM's sampling parameters made of it."""
        self._tokenizer = tokenizer
        self._params = SamplingParams(max_tokens=None, **{name: getattr(request, name) for name in _OF_TEXT})
        self._texts: dict[int, IncrementalDetokenizer] = {}  # by choice

    def __call__(self, output: RequestOutput) -> list[RequestOutput]:
        """Outputs of one token each, in order; one that has no more is returned as it is."""
        pieces = [piece for whole in output.outputs for piece in self._pieces(whole, output.prompt_token_ids)]
        if len(pieces) <= 1:
            return [output]
        found = []
        for piece in pieces:
            single = copy.copy(output)
            single.outputs = [piece]
            single.finished = output.finished and piece is pieces[-1]
            found.append(single)
        return found

    def _pieces(self, whole: CompletionOutput, prompt_token_ids: list[int] | None) -> list[CompletionOutput]:
        token_ids = list(whole.token_ids)
        # Asked for every token, also for single ones: how much text a token adds depends on those before.
        ends = list(accumulate(self._added(whole.index, token, prompt_token_ids) for token in token_ids))
        if len(token_ids) <= 1:
            return [whole]
        # With the end of an answer comes what was held back in case a stop string would begin there.
        ends[-1] = len(whole.text)
        pieces = [
            replace(
                whole,
                text=whole.text[start:end],
                token_ids=token_ids[i : i + 1],
                logprobs=None if whole.logprobs is None else whole.logprobs[i : i + 1],
                sampling_mask=None if whole.sampling_mask is None else SamplingMask(whole.sampling_mask.token_ids[i : i + 1]),
            )
            for i, (start, end) in enumerate(pairwise([0, *ends]))
        ]
        return [*(replace(piece, **dict.fromkeys(_AT_THE_END)) for piece in pieces[:-1]), pieces[-1]]

    def _added(self, index: int, token: int, prompt_token_ids: list[int] | None) -> int:
        """The characters that vLLM would have sent with this token, had it come alone."""
        if index not in self._texts:
            self._texts[index] = self._detokenizer(prompt_token_ids)
        text = self._texts[index]
        text.update([token], stop_terminated=False)
        return len(text.get_next_output_text(finished=False, delta=True))

    def _detokenizer(self, prompt_token_ids: list[int] | None) -> IncrementalDetokenizer:
        request = EngineCoreRequest(
            request_id="",
            prompt_token_ids=prompt_token_ids,
            mm_features=None,
            sampling_params=self._params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        return IncrementalDetokenizer.from_new_request(self._tokenizer, request)


def _has_trees(serving: Any) -> bool:
    return is_tree_mode(serving.engine_client.vllm_config.speculative_config)


async def _outputs(outputs: AsyncGenerator[RequestOutput, None], cut: Cutter) -> AsyncGenerator[RequestOutput, None]:
    async with aclosing(outputs):  # a client that leaves must still abort its request at once
        async for output in outputs:
            for piece in cut(output):
                yield piece


async def _contexts(contexts: AsyncGenerator[Any, None], cut: Cutter) -> AsyncGenerator[Any, None]:
    """The context has counted the whole output; only who reads its last one shall see it token by token."""
    async with aclosing(contexts):
        async for context in contexts:
            whole = context.last_output
            for piece in [] if whole is None else cut(whole):
                context.last_output = piece
                yield context
            context.last_output = whole
