"""Streaming clients against a server for some seconds: throughput, latencies, and tokens per target pass (tau).

KEEP=1 bash examples/04_serve.sh &
python examples/07_load_test.py [--url http://127.0.0.1:8000] [--clients 8] [--seconds 20] [--temperature 0]

Asks the built-in questions, or those of --prompts FILE, one {"prompt": ...} a line. vLLM's own load test takes the same file:

vllm bench serve --base-url http://127.0.0.1:8000 --backend openai-chat --endpoint /v1/chat/completions --model demo \
    --tokenizer MODEL --dataset-name custom --dataset-path FILE --skip-chat-template --num-prompts 64 --max-concurrency 8
"""

import argparse
import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
from openai import AsyncOpenAI

from vllm_eagle.bench.engines.offline import BUILT_IN_PROMPTS


@dataclass
class Measured:
    """What all clients saw, in seconds."""

    answers: int = 0
    tokens: int = 0
    first_token: list[float] = field(default_factory=list)  # from asking to the first token
    between_tokens: list[float] = field(default_factory=list)  # time since the event before, spread over an event's tokens


async def ask(client: AsyncOpenAI, model: str, question: str, args: argparse.Namespace, measured: Measured) -> None:
    """One streamed answer."""
    last = time.perf_counter()
    tokens = 0
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        stream=True,
        extra_body={"stream_options": {"include_usage": True, "continuous_usage_stats": True}},  # tokens so far, in every event
    )
    async for event in stream:
        new = event.usage.completion_tokens - tokens if event.usage else 0
        if new == 0:
            continue  # the role, or the sum at the end
        now = time.perf_counter()
        if tokens == 0:
            measured.first_token.append(now - last)
        else:
            measured.between_tokens += [(now - last) / new] * new
        tokens, last = tokens + new, now
        measured.tokens += new
    measured.answers += 1


async def run(args: argparse.Namespace, questions: Iterator[str]) -> tuple[Measured, float]:
    """Keep every client asking until the time is up; answers that have begun are read to their end."""
    measured = Measured()
    async with AsyncOpenAI(base_url=f"{args.url}/v1", api_key="none", timeout=600) as client:
        model = (await client.models.list()).data[0].id
        start = time.perf_counter()

        async def one_client() -> None:
            while time.perf_counter() - start < args.seconds:
                await ask(client, model, next(questions), args, measured)

        await asyncio.gather(*(one_client() for _ in range(args.clients)))
        return measured, time.perf_counter() - start


def counters(url: str) -> dict[str, float]:
    """vLLM's counters of speculation; empty if it is off."""
    found: dict[str, float] = {}
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith("vllm:spec_decode_num_"):
            name = line.split("{")[0].removeprefix("vllm:spec_decode_num_")
            found[name] = found.get(name, 0) + float(line.rsplit(" ", 1)[1])
    return found


def percentiles(seconds: list[float]) -> str:
    """Median and 99th percentile in milliseconds."""
    if not seconds:
        return "not measured: no answer had so many tokens"
    p50, p99 = 1000 * np.percentile(seconds, [50, 99])
    return f"p50 {p50:8.1f} ms   p99 {p99:8.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0)
    parser.add_argument("--prompts", type=Path)
    args = parser.parse_args()

    rows = [json.loads(line) for line in (args.prompts or BUILT_IN_PROMPTS).read_text(encoding="utf-8").splitlines()]
    questions = itertools.cycle([row["prompt"] if "prompt" in row else row["messages"][-1]["content"] for row in rows])
    before = counters(args.url)
    measured, seconds = asyncio.run(run(args, questions))
    after = counters(args.url)

    print(f"{args.clients} clients, {seconds:.1f} s, {measured.answers} answers, {measured.tokens} tokens")
    print(f"throughput           {measured.tokens / seconds:.1f} tokens/s")
    print(f"time to first token  {percentiles(measured.first_token)}")
    print(f"between tokens       {percentiles(measured.between_tokens)}")
    passes = after.get("drafts_total", 0) - before.get("drafts_total", 0)
    if passes:
        accepted = after["accepted_tokens_total"] - before["accepted_tokens_total"]
        print(f"tau                  {1 + accepted / passes:.2f} tokens per target pass and request")
    else:
        print("tau                  1.00: the server does not speculate")


if __name__ == "__main__":
    main()
