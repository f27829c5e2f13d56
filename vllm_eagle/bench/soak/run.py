"""A server with draft trees under mixed load for a long time, checked against a plain server: answers, leaks, memory, log.

    python -m vllm_eagle.bench.soak.run --minutes 15 --clients 64 --json soak.json

starts both servers itself, one after the other, on the shipped pair. For servers that are running already, on any machine:

    python -m vllm_eagle.bench.soak.run --base-url http://trees:8000 --reference-url http://plain:8000

Both must serve the same model with the same dtype and length; float32 if answers are to be equal to the token. On CPU the reference
needs `--max-num-batched-tokens 16384`: vLLM 0.32 fails there when the prompt of a seeded request is split over two steps.
"""

import argparse
import asyncio
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp

from vllm_eagle.bench.engines.offline import BUILT_IN_PROMPTS
from vllm_eagle.bench.engines.server import Sample, Watch, error_lines, serve
from vllm_eagle.bench.soak.checks import Check, Seen, checks, failed, tau
from vllm_eagle.bench.soak.clients import Answer, Client, Connection, Script, Tally, difference
from vllm_eagle.bench.soak.pool import Ask, pool, refused
from vllm_eagle.pair import HEAD, TARGET

MAX_MODEL_LEN = 512
COMMON = (
    *("--served-model-name", "soak"),
    *("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--block-size", "32", "--enforce-eager"),
)
PLAIN = ("--max-num-batched-tokens", "16384", "--kv-cache-memory-bytes", str(1 << 29))
REFERENCE_CLIENTS = 16
IDLE_S = 300


@dataclass(frozen=True, slots=True)
class Settings:
    """A run, as on the command line."""

    minutes: float
    clients: int
    pool: int
    seed: int
    num_draft_tokens: int
    kv_blocks: int
    sample_s: float


def tree_options(settings: Settings) -> tuple[str, ...]:
    """A server with trees whose KV cache is too small for the clients."""
    return (
        *("--speculative-model", str(HEAD), "--num-speculative-tokens", str(settings.num_draft_tokens)),
        "--no-speculative-tree-budget",  # the shipped model is too small for trees to pay
        # Fewer places and tokens per step than the clients want: requests wait, prompts are split and trees are cut.
        *("--max-num-seqs", "48", "--max-num-batched-tokens", "1024", "--kv-cache-memory-bytes", str(1 << 28)),
        *("--num-gpu-blocks-override", str(settings.kv_blocks)),
    )


async def prepare(url: str, settings: Settings) -> tuple[list[Ask], int]:
    """The pool for a server's model, and the model's length."""
    chats = [json.loads(line)["messages"] for line in BUILT_IN_PROMPTS.read_text().splitlines()]
    async with aiohttp.ClientSession(url, raise_for_status=True) as session:
        async with session.get("/v1/models") as response:
            card = (await response.json())["data"][0]
        questions = []
        for messages in chats:
            async with session.post("/tokenize", json={"model": card["id"], "messages": messages}) as response:
                questions.append((await response.json())["tokens"])
    return pool(card["id"], questions, chats, card["max_model_len"], settings.pool, settings.seed), card["max_model_len"]


async def collect(url: str, asks: Sequence[Ask]) -> dict[int, Answer]:
    """Answers to all comparable requests.

    Raises:
        ValueError: the server refuses one or breaks down.
    """
    found: dict[int, Answer] = {}
    waiting = [ask for ask in asks if ask.comparable]

    async def client() -> None:
        async with Connection(url) as connection:
            while waiting:
                ask = waiting.pop()
                answer = await connection.ask(ask)
                if answer.error is not None:
                    raise ValueError(f"the reference server at {url} refuses request {ask.number} ({ask.kind}): {answer.error}")
                found[ask.number] = answer

    await asyncio.gather(*(client() for _ in range(REFERENCE_CLIENTS)))
    return found


async def load(
    url: str, asks: Sequence[Ask], reference: dict[int, Answer], max_model_len: int, settings: Settings, watch: Watch
) -> tuple[Tally, Sample, Sample]:
    """Warm up, run the clients for the time that was asked for, wait for rest; returns the samples at rest, too."""
    await collect(url, asks[: 2 * REFERENCE_CLIENTS])
    before = await _rest(url, asks[0], watch)
    watch.samples.clear()
    nonsense = refused(asks[0].body["model"], max_model_len, settings.num_draft_tokens)
    tally = Tally()
    until_s = time.monotonic() + 60 * settings.minutes
    watching = asyncio.create_task(_watch(watch, settings.sample_s, tally))
    script = Script(asks, reference, nonsense, settings.seed)
    try:
        await asyncio.gather(*(Client(url, script, tally).run(until_s) for _ in range(settings.clients)))
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError, aiohttp.ClientError):
            await watching
    samples = list(watch.samples)
    after = await _rest(url, asks[0], watch)
    watch.samples[:] = samples
    return tally, before, after


async def _watch(watch: Watch, every_s: float, tally: Tally) -> None:
    while True:
        sample = await watch.look()
        metrics = sample.metrics
        print(
            f"{sample.seconds:6.0f} s  {sum(tally.requests.values()):6d} requests {tally.tokens:8d} tokens  "
            f"running {metrics['vllm:num_requests_running']:3.0f} waiting {metrics['vllm:num_requests_waiting']:3.0f}  "
            f"preempted {metrics['vllm:num_preemptions_total']:5.0f}  "
            f"{sum(sample.rss_bytes.values()) / 2**20:5.0f} MiB  errors {tally.errors} different {tally.mismatches}",
            flush=True,
        )
        await asyncio.sleep(every_s)


async def _rest(url: str, ask: Ask, watch: Watch) -> Sample:
    """A sample of the server when all clients are gone."""
    until_s = time.monotonic() + IDLE_S
    while True:
        # vLLM sets its gauges after a step, so that what was aborted last stays in them until somebody asks again.
        async with Connection(url) as connection:
            await connection.ask(ask)
        sample = await watch.look()
        busy = sample.metrics["vllm:num_requests_running"] + sample.metrics["vllm:num_requests_waiting"]
        if busy == 0 or time.monotonic() > until_s:
            return sample
        await asyncio.sleep(2)


async def replay(url: str, asks: Sequence[Ask], reference: dict[int, Answer], tally: Tally) -> dict[int, str | None]:
    """Ask again, alone, what was answered differently: how it differs now, None if not at all."""
    numbers = {failure.number for failure in tally.failures if failure.number is not None}
    async with Connection(url) as connection:
        return {n: difference(reference[n], await connection.ask(asks[n])) for n in sorted(numbers & reference.keys())}


async def _with_servers_of_others(settings: Settings, args: argparse.Namespace) -> tuple[Seen, dict[int, str | None]]:
    asks, max_model_len = await prepare(args.base_url, settings)
    twins, twin_len = await prepare(args.reference_url, settings)
    if [ask.body for ask in asks] != [ask.body for ask in twins] or max_model_len != twin_len:
        raise ValueError("--base-url and --reference-url serve different models, under different names or with different lengths")
    return await _run(args.base_url, asks, await collect(args.reference_url, twins), max_model_len, settings, args.pid, args.log)


async def _run(
    url: str,
    asks: Sequence[Ask],
    reference: dict[int, Answer],
    max_model_len: int,
    settings: Settings,
    pid: int | None,
    log: Path | None,
) -> tuple[Seen, dict[int, str | None]]:
    watch = Watch(url, pid)
    tally, before, after = await load(url, asks, reference, max_model_len, settings, watch)
    replayed = await replay(url, asks, reference, tally)
    kinds = frozenset(ask.kind for ask in asks if ask.comparable)
    return Seen(tally, before, watch.samples, after, None if log is None else error_lines(log), kinds), replayed


def _with_own_servers(settings: Settings, folder: Path) -> tuple[Seen, dict[int, str | None]]:
    async def ask_plain(url: str) -> tuple[list[Ask], int, dict[int, Answer]]:
        asks, max_model_len = await prepare(url, settings)
        return asks, max_model_len, await collect(url, asks)

    start_s = time.monotonic()
    # One server at a time, so that they do not fight for the cores.
    with serve(str(TARGET), [*COMMON, *PLAIN], folder / "plain.log") as (url, _):
        asks, max_model_len, reference = asyncio.run(ask_plain(url))
    print(f"{len(reference)} reference answers in {time.monotonic() - start_s:.0f} s", flush=True)
    log = folder / "trees.log"
    with serve(str(TARGET), [*COMMON, *tree_options(settings)], log) as (url, pid):
        return asyncio.run(_run(url, asks, reference, max_model_len, settings, pid, log))


def report(settings: Settings, seen: Seen, found: Sequence[Check], replayed: dict[int, str | None]) -> dict[str, Any]:
    """What the JSON holds."""
    tally, samples = seen.tally, seen.samples
    return {
        "passed": not failed(found),
        "checks": [asdict(check) for check in found],
        "requests": dict(tally.requests),
        "tokens": tally.tokens,
        "equal": dict(tally.equal),
        "equal_beginnings": tally.equal_beginnings,
        "refused": tally.refused,
        "slowest_s": round(tally.slowest_s, 1),
        "tau": round(tau(samples[0], samples[-1])[0], 3),
        "preemptions": seen.after.metrics.get("vllm:num_preemptions_total"),
        "failures": [asdict(failure) for failure in tally.failures],
        "alone": replayed,
        "rss_mib": {
            name: [round(sample.rss_bytes[name] / 2**20, 1) for sample in samples if name in sample.rss_bytes]
            for name in samples[0].rss_bytes
        },
        "settings": asdict(settings)
        | {"model": TARGET.name, "head": HEAD.name, "dtype": "float32", "max_model_len": MAX_MODEL_LEN},
        "versions": {"vllm": version("vllm"), "torch": version("torch"), "python": platform.python_version()},
    }


def summary(found: Sequence[Check], replayed: dict[int, str | None], seen: Seen) -> str:
    """The table at the end."""
    word = {True: "ok", False: "FAIL", None: "-"}
    lines = [f"{word[check.passed]:<6}{check.name:<34}{check.detail}" for check in found]
    for failure in seen.tally.failures[:10]:
        body = json.dumps(failure.body)
        lines.append(f"  {failure.seconds} s, {failure.behaviour}, request {failure.number}: {failure.what}; {body[:300]}")
        if failure.number in replayed:
            lines.append(f"    asked again, alone: {replayed[failure.number] or 'equal'}")
    lines.append("FAIL" if failed(found) else "PASS")
    return "\n".join(lines)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15, help="of load (default %(default)s)")
    parser.add_argument("--clients", type=int, default=64, help="at the same time (default %(default)s)")
    parser.add_argument("--pool", type=int, default=322, help="different requests (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-draft-tokens", type=int, default=16, help="nodes per tree (default %(default)s)")
    parser.add_argument(
        "--kv-blocks", type=int, default=160, help="KV cache of the tree server, blocks of 32 (default %(default)s)"
    )
    parser.add_argument("--sample-seconds", type=float, default=10, help="between two looks at the server (default %(default)s)")
    parser.add_argument("--base-url", help="a running server with trees, in place of an own one")
    parser.add_argument("--reference-url", help="a running server without, for the same model")
    parser.add_argument("--pid", type=int, help="process of the server at --base-url, if it is on this machine")
    parser.add_argument("--log", type=Path, help="its log")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    if (args.base_url is None) != (args.reference_url is None):
        parser.error("--base-url and --reference-url belong together; give both, or neither for own servers")
    if args.base_url is None and (args.pid or args.log):
        parser.error("--pid and --log are for a server given with --base-url")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: its folder does not exist; create it first")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parse(argv)
    settings = Settings(
        args.minutes, args.clients, args.pool, args.seed, args.num_draft_tokens, args.kv_blocks, args.sample_seconds
    )
    try:
        if args.base_url is not None:
            seen, replayed = asyncio.run(_with_servers_of_others(settings, args))
        else:
            folder = Path(tempfile.mkdtemp(prefix="soak-"))
            print(f"logs of the servers: {folder}", flush=True)
            seen, replayed = _with_own_servers(settings, folder)
    except ValueError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    found = checks(seen)
    if args.json is not None:
        args.json.write_text(json.dumps(report(settings, seen, found, replayed)) + "\n")
    print(summary(found, replayed, seen))
    return int(bool(failed(found)))


if __name__ == "__main__":
    sys.exit(main())
