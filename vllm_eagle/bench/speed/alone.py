"""`vllm-eagle bench --alone VARIANT`: one engine, started once, asked at every load and temperature; for where time is short.

Variants do not take turns here, so ratios to plain vLLM's numbers, measured in another call, are as good as the machine is quiet: a
GPU of one's own. After every load a line of JSON tells all that is known so far; the last one is the result.
"""

import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_eagle.bench.engines import mended
from vllm_eagle.bench.engines.offline import engine, prepare_environment, timed_arguments
from vllm_eagle.bench.recorded.replay import write_pair
from vllm_eagle.bench.speed import sustained
from vllm_eagle.bench.speed.throughput import PLAIN, Settings, _asks, encoded, variants

# Passes of decoding requests as whole graphs, nothing compiled: that takes longer than measuring. For all variants alike.
QUICK_START = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
_COUPLED = ("trees", "fixed", "static")


def run(settings: Settings, name: str, temperatures: Sequence[float], minutes: float | None) -> int:
    """Measure one variant until all is known or `minutes` are over. Returns 0.

    Raises:
        ValueError: a variant or a value that cannot be measured.
    """
    began_s = time.monotonic()
    if settings.http or settings.only or settings.medusa:
        raise ValueError("--alone measures one offline engine; remove --http, --only and --medusa")
    if settings.replay is not None and max(temperatures) > 0 and name.startswith(_COUPLED) and not name.endswith("uncoupled"):
        raise ValueError(f"--replay replays a greedy head, which noise would only spoil; take uncoupled for {name}, or T=0")
    prepare_environment(settings.threads)
    mended.mend_sampled_chains()
    with tempfile.TemporaryDirectory() as folder:
        if settings.replay is not None:
            target, head = write_pair(Path(folder), settings.replay)
            settings = replace(settings, model=str(target), head=str(head))
        chosen = variants(replace(settings, only=None if name == PLAIN else [name]))[name]
        prompts = encoded(settings)
        end_s = None if minutes is None else began_s + 60 * minutes
        for result in measure(settings, prompts, name, chosen, temperatures, end_s):
            print(json.dumps(result), flush=True)
    return 0


def measure(
    settings: Settings,
    prompts: list[list[int]],
    name: str,
    chosen: dict[str, Any],  # engine arguments of the variant
    temperatures: Sequence[float],
    end_s: float | None,  # on the monotonic clock, after which nothing more is begun
) -> Iterator[dict[str, Any]]:
    """What is known, after the start and after every load."""
    import torch

    common = timed_arguments(prompts, settings.max_tokens, max(settings.concurrency), settings.dtype, settings.enforce_eager)
    if settings.replay is not None:
        common["load_format"] = "dummy"
    if not torch.cuda.is_available():
        common["kv_cache_memory_bytes"] = 1 << 30
    elif not settings.enforce_eager:
        common |= QUICK_START
    start_s = time.monotonic()
    with engine(settings.model, **common, **chosen, **(sustained.METRICS if chosen else {})) as llm:
        sustained.offline(llm, _asks(settings, prompts, 2, 0), 2)
        loads = [(temperature, number) for temperature in temperatures for number in settings.concurrency]
        result: dict[str, Any] = {
            "variant": name,
            "start_s": round(time.monotonic() - start_s, 1),
            "loads": {},
            "left_out": [_load(*each) for each in loads],
            "settings": {"dtype": settings.dtype, "max_tokens": settings.max_tokens, "replay": settings.replay}
            | {key: common[key] for key in ("enforce_eager", "compilation_config") if key in common},
        }
        yield result
        for temperature, number in loads:
            if end_s is not None and time.monotonic() > end_s:
                return
            asked = replace(settings, temperature=temperature)
            rounds = [sustained.offline(llm, _asks(asked, prompts, number, turn), number) for turn in range(settings.rounds)]
            result["loads"][_load(temperature, number)] = {
                "tokens_per_s": round(statistics.median(found.tokens_per_s for found in rounds), 2),
                "tau": round(statistics.median(found.tau for found in rounds), 3),
                # To be held against those of another variant.
                "answers": [_digest(token_ids) for found in rounds for token_ids in found.token_ids],
            }
            result["left_out"].remove(_load(temperature, number))
            yield result


def _load(temperature: float, number: int) -> str:
    return f"T={temperature:g}, {number} at once"


def _digest(token_ids: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(token_ids)).encode()).hexdigest()[:8]
