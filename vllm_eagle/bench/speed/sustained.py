"""So many requests in flight all the time, as from so many users who each ask again once they are answered.

Offline through an engine, or over HTTP with the request function of `vllm bench serve`.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_eagle.bench.engines.offline import Generated, generated

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput

METRICS = {"per_request_spec_decode_metrics": "summary"}  # engine argument, of engines that speculate


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    prompt_token_ids: list[int]
    temperature: float
    seed: int
    max_tokens: int


Answer = Callable[[Sequence[Ask], int], Generated]  # of an engine or a server: requests, how many at once


def offline(llm: "LLM", asks: Sequence[Ask], at_once: int) -> Generated:
    """Answer all, `at_once` at a time. tau needs an engine with METRICS."""
    from vllm_eagle.bench.speed.output_gaps import output_gaps

    waiting = deque(enumerate(asks))
    answers: dict[int, RequestOutput] = {}
    in_flight, busy = 0, None
    with output_gaps(llm) as told:
        start = time.perf_counter()
        while waiting or in_flight:
            while waiting and in_flight < at_once:
                number, ask = waiting.popleft()
                llm.llm_engine.add_request(str(number), {"prompt_token_ids": ask.prompt_token_ids}, _params(ask))
                in_flight += 1
            for output in llm.llm_engine.step():
                if output.finished:
                    answers[int(output.request_id)] = output
                    in_flight -= 1
            if busy is None and not waiting and in_flight < at_once:
                busy = (told.num_tokens, time.perf_counter() - start)
        seconds = time.perf_counter() - start
    outputs = [answers[number] for number in range(len(asks))]
    verified = [drafts for output in outputs if (drafts := output.outputs[0].spec_decode_metrics) is not None]
    num_trees = sum(sum(x.histogram) for x in verified)
    accepted = sum(length * count for x in verified for length, count in enumerate(x.histogram))
    found = generated(outputs, seconds, tau=1 + accepted / num_trees if num_trees else 1.0)
    return replace(found, gaps_s=told.seconds, busy=busy)


def _params(ask: Ask) -> "SamplingParams":
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=ask.temperature, seed=ask.seed, max_tokens=ask.max_tokens, output_kind=RequestOutputKind.FINAL_ONLY
    )


def over_http(url: str, model: str, asks: Sequence[Ask], at_once: int) -> Generated:
    """Answer all by a server, streamed.

    Raises:
        RuntimeError: the server refused a request, or broke off.
    """
    return asyncio.run(_over_http(url, model, asks, at_once))


async def _over_http(url: str, model: str, asks: Sequence[Ask], at_once: int) -> Generated:
    import aiohttp
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, async_request_openai_completions

    from vllm_eagle.bench.engines.server import read_metrics

    waiting = deque(enumerate(asks))
    answers: dict[int, RequestFuncOutput] = {}
    asked_s: dict[int, float] = {}
    out_of_questions_s: list[float] = []

    async def user(session: aiohttp.ClientSession) -> None:
        while waiting:
            number, ask = waiting.popleft()
            body: dict[str, Any] = {"temperature": ask.temperature, "seed": ask.seed}
            request = RequestFuncInput(
                prompt=ask.prompt_token_ids,
                api_url=f"{url}/v1/completions",
                prompt_len=len(ask.prompt_token_ids),
                output_len=ask.max_tokens,
                model=model,
                extra_body=body,
            )
            asked_s[number] = time.perf_counter()
            answers[number] = await async_request_openai_completions(request, session)
            if not answers[number].success:
                raise RuntimeError(f"{url}: {answers[number].error}")
        out_of_questions_s.append(time.perf_counter())

    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=3600), connector=aiohttp.TCPConnector(limit=0)) as session,
        aiohttp.ClientSession(url) as metrics,
    ):
        before = await read_metrics(metrics)
        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(user(session))
        seconds = time.perf_counter() - start
        after = await read_metrics(metrics)
    outputs = [answers[number] for number in range(len(asks))]
    busy_until_s = min(out_of_questions_s)
    busy_tokens = sum(until(busy_until_s, asked_s[number], answers[number]) for number in range(len(asks)))
    drafts, accepted = (
        after.get(name, 0.0) - before.get(name, 0.0)
        for name in ("vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_accepted_tokens_total")
    )
    return Generated(
        token_ids=[],
        texts=[output.generated_text for output in outputs],
        seconds=seconds,
        tau=1 + accepted / drafts if drafts else 1.0,
        first_token_s=[output.ttft for output in outputs],
        next_token_s=[(output.latency - output.ttft) / max(1, output.output_tokens - 1) for output in outputs],
        num_tokens=sum(output.output_tokens for output in outputs),
        gaps_s=[gap for output in outputs for gap in output.itl],
        busy=(busy_tokens, busy_until_s - start),
    )


def until(now_s: float, asked_s: float, answer: "RequestFuncOutput") -> float:
    """How many tokens of an answer had come by some time. Its outputs hold equally many, as far as can be told."""
    times_s = asked_s + np.cumsum([answer.ttft, *answer.itl])
    return answer.output_tokens * float((times_s <= now_s).mean())
