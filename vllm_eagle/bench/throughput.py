"""`vllm-eagle bench`: output tokens per second of plain vLLM, of its own drafters and of our trees, from one request to many.

One engine per variant, each in processes of its own, all alive at once. In every round each of them answers the same requests in
turn, in an order that changes from round to round; ratios are taken within a round, so that what disturbs the machine for longer
disturbs both sides. Tokens are compared with plain vLLM's while timing.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eagle.bench import throughput_report
from vllm_eagle.bench.offline import Generated, encode_prompts, engine, generate, prepare_environment
from vllm_eagle.config import CONFIG_KEY
from vllm_eagle.serve import head_method

if TYPE_CHECKING:
    from vllm import LLM

PLAIN = "plain"
_SETTLE_S = 1.5  # after its last step a worker of vLLM polls for a second, on a core that the next engine needs


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure, as on the command line."""

    model: str
    head: str
    prompts: Path | None
    temperature: float
    seed: int
    max_tokens: int
    dtype: str
    concurrency: tuple[int, ...]
    rounds: int
    num_draft_tokens: int
    only: list[str] | None
    threads: int | None


def variants(settings: Settings) -> dict[str, dict[str, Any]]:
    """Engine arguments by name; `trees` is what users get by default."""

    def ours(**options: Any) -> dict[str, Any]:
        return {
            "spec_model": settings.head,
            "spec_tokens": settings.num_draft_tokens,
            "additional_config": {CONFIG_KEY: options},
        }

    named: dict[str, dict[str, Any]] = {PLAIN: {}}
    for size in (1, 3, 5):
        chain = {"method": head_method(settings.head), "model": settings.head, "num_speculative_tokens": size}
        named[f"vllm_chain{size}"] = {"speculative_config": chain}
    lookup = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 1}
    named["vllm_ngram5"] = {"speculative_config": lookup}
    named["static"] = ours(mode="static", budget=False)
    named["fixed"] = ours(budget=False)
    named["trees"] = ours()
    unknown = [name for name in settings.only or [] if name not in named]
    if unknown:
        raise ValueError(f"--only: unknown variant {', '.join(unknown)}; known: {', '.join(named)}")
    return {name: options for name, options in named.items() if not settings.only or name in (PLAIN, *settings.only)}


def run(settings: Settings, out: Path | None) -> int:
    """Measure, print a table and, last, one JSON line; with `out` also write bench.json, bench.md and bench.png there."""
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is no folder; name another one")
    if min(settings.concurrency, default=0) < 1 or settings.rounds < 1 or settings.max_tokens < 2:
        raise ValueError("--concurrency and --rounds must be at least 1 and --max-tokens at least 2")
    chosen = variants(settings)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    if settings.threads is not None:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    prepare_environment()
    result = measure(settings, encode_prompts(settings.model, settings.prompts), chosen)
    print(throughput_report.table(result))
    if out is not None:
        throughput_report.write(result, out)
    print(json.dumps(result))
    return 0


def measure(settings: Settings, prompts: list[list[int]], chosen: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the JSON holds."""
    import vllm

    longest = max(map(len, prompts)) + settings.max_tokens + 1
    most = max(settings.concurrency)
    common: dict[str, Any] = {
        "dtype": settings.dtype,
        "max_model_len": longest,
        "kv_cache_memory_bytes": 1 << 30,
        "max_num_seqs": most,
        # vLLM 0.32 on CPU fails when the prompt of a seeded request is split over two steps, so all must fit into one.
        "max_num_batched_tokens": max(longest, most * max(map(len, prompts))) + 128 * most,
    }
    with ExitStack() as stack:
        engines: dict[str, LLM] = {}
        for name, options in chosen.items():
            print(f"starting {name} ...", file=sys.stderr, flush=True)
            engines[name] = stack.enter_context(engine(settings.model, **common, **options))
            _ask(engines[name], settings, prompts, 2, 0)
        by_concurrency = {}
        for number in settings.concurrency:
            rounds = [_round(engines, settings, prompts, number, turn) for turn in range(settings.rounds)]
            by_concurrency[str(number)] = {name: _summary(rounds, name) for name in engines}
            _progress(number, by_concurrency[str(number)])
    return {
        "concurrency": by_concurrency,
        "settings": asdict(settings)
        | {"model": Path(settings.model).name, "head": Path(settings.head).name, "prompts": str(settings.prompts or "built in")},
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "versions": {"vllm": vllm.__version__, "python": platform.python_version()},
    }


def _round(engines: dict[str, "LLM"], settings: Settings, prompts: list[list[int]], number: int, turn: int) -> dict[str, Generated]:
    names = list(engines)
    shift = turn % len(names)
    found = {}
    for name in names[shift:] + names[:shift]:
        time.sleep(_SETTLE_S)
        found[name] = _ask(engines[name], settings, prompts, number, turn)
    return found


def _ask(llm: "LLM", settings: Settings, prompts: list[list[int]], number: int, turn: int) -> Generated:
    """So many requests at once; every round asks others, so that no prefix cache helps."""
    from vllm import SamplingParams

    start = turn * number
    asked = [prompts[(start + i) % len(prompts)] for i in range(number)]
    params = [
        SamplingParams(temperature=settings.temperature, seed=settings.seed + start + i, max_tokens=settings.max_tokens)
        for i in range(number)
    ]
    return generate(llm, asked, params)


def _summary(rounds: Sequence[dict[str, Generated]], name: str) -> dict[str, Any]:
    """Medians over the rounds of one variant."""
    mine, plain = [each[name] for each in rounds], [each[PLAIN] for each in rounds]
    rates = [found.tokens / found.seconds for found in mine]
    ratios = [rate / (base.tokens / base.seconds) for rate, base in zip(rates, plain, strict=True)]
    pairs = [pair for found, base in zip(mine, plain, strict=True) for pair in zip(found.token_ids, base.token_ids, strict=True)]
    return {
        "tokens_per_s": round(statistics.median(rates), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "tau": round(statistics.median(found.tau for found in mine), 3),
        "first_token_ms": _milliseconds([x for found in mine for x in found.first_token_s]),
        "next_token_ms": _milliseconds([x for found in mine for x in found.next_token_s]),
        "identical": sum(one == other for one, other in pairs),
        "answers": len(pairs),
    }


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    import numpy as np

    return {f"p{q}": round(1000 * float(np.percentile(seconds, q)), 2) for q in (50, 99)}


def _progress(number: int, found: dict[str, dict[str, Any]]) -> None:
    each = "  ".join(f"{name} {x['tokens_per_s']:.1f} ({x['ratio']:.2f}x)" for name, x in found.items())
    print(f"{number} at once: {each}", file=sys.stderr, flush=True)
