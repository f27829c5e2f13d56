"""`vllm-eagle bench`: output tokens per second of plain vLLM, of its own drafters and of our trees, from one request to many.

One engine in a process of its own, or one server, per variant, all alive at once. In every round each of them answers the same
requests in turn, so many at a time, in an order that changes from round to round; ratios are taken within a round, so that what
disturbs the machine for longer disturbs both sides. Answers are compared with plain vLLM's while timing.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_eagle.bench.engines import mended
from vllm_eagle.bench.engines.drafters import ours, vllm_chain, vllm_medusa, vllm_ngram
from vllm_eagle.bench.engines.offline import Generated, encode_prompts, prepare_environment, timed_arguments
from vllm_eagle.bench.engines.workloads import WORKLOADS
from vllm_eagle.bench.recorded.replay import write_pair
from vllm_eagle.bench.speed import report
from vllm_eagle.bench.speed.sides import device_bytes, engine_side, server_side
from vllm_eagle.bench.speed.sustained import Answer, Ask

PLAIN = "plain"
_FEWEST = 8  # answers in a round
_SWEEP = (1, 2, 3, 4, 5, 8, 16, 32)  # nodes of fixed trees, if asked for
_MOST = (16, 32)  # nodes that the budget may choose from, likewise
_SETTLE_S = 1.5  # after its last step a server of vLLM polls for a second, on a core that the next one needs


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
    num_draft_tokens: int | None
    only: list[str] | None
    threads: int | None
    medusa: str | None = None
    http: bool = False
    enforce_eager: bool = False
    replay: str | None = None
    workload: str = "questions"


def variants(settings: Settings) -> dict[str, dict[str, Any]]:
    """Engine arguments by name; `trees` is what users get by default, `treesN` has at most N nodes, `fixedN` likewise without the
    budget.

    Those of vLLM's chains that are `_adaptive` run on GPUs alone.
    """

    own = partial(ours, settings.head, settings.num_draft_tokens)
    named: dict[str, dict[str, Any]] = {PLAIN: {}}
    for size in (1, 3, 5):
        named[f"vllm_chain{size}"] = vllm_chain(settings.head, size)
    named["vllm_ngram5"] = vllm_ngram(5)
    if settings.medusa is not None:
        named["vllm_medusa"] = vllm_medusa(settings.medusa)
    named["static"] = own(mode="static", budget=False)
    named["fixed"] = own(budget=False)
    named["trees"] = own()
    usual = list(named)
    named |= {f"vllm_chain{size}_adaptive": vllm_chain(settings.head, size, adaptive=True) for size in (3, 5)}
    named |= {"uncoupled": own(coupled=False), "fixed_uncoupled": own(coupled=False, budget=False)}
    named |= {f"fixed{size}": ours(settings.head, size, budget=False) for size in _SWEEP}
    named |= {f"trees{size}": ours(settings.head, size) for size in _MOST}
    unknown = [name for name in settings.only or [] if name not in named]
    if unknown:
        raise ValueError(f"--only: unknown variant {', '.join(unknown)}; known: {', '.join(named)}")
    return {name: named[name] for name in named if name in ((PLAIN, *settings.only) if settings.only else usual)}


def run(settings: Settings, out: Path | None) -> int:
    """Measure, print a table and, last, one JSON line; with `out` also write bench.json, bench.md and bench.png there.

    Returns 1 if answers of our variants differ from plain vLLM's where they must not: greedy ones in float32.
    """
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is no folder; name another one")
    if min(settings.concurrency, default=0) < 1 or settings.rounds < 1 or settings.max_tokens < 2:
        raise ValueError("--concurrency and --rounds must be at least 1 and --max-tokens at least 2")
    if settings.replay is not None and (settings.temperature > 0 or settings.medusa is not None):
        raise ValueError("--replay replays a greedy EAGLE head; remove --temperature and --medusa")
    variants(settings)  # that --only is right
    prepare_environment(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        if settings.replay is not None:
            target, head = write_pair(Path(folder), settings.replay)
            settings = replace(settings, model=str(target), head=str(head))
        save = None if out is None else partial(report.write, folder=out)
        result = measure(settings, encoded(settings), variants(settings), save)
    print("\n".join([report.table(result), *report.differences(result), *filter(None, [result["note"]])]))
    print(json.dumps(result))
    return int(report.is_wrong(result))


def encoded(settings: Settings) -> list[list[int]]:
    """Token ids of the workload's prompts."""
    context_tokens = WORKLOADS[settings.workload].context_tokens
    return encode_prompts(settings.model, settings.prompts, max_tokens=settings.max_tokens + 1, context_tokens=context_tokens)


def measure(
    settings: Settings,
    prompts: list[list[int]],
    chosen: dict[str, dict[str, Any]],
    save: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """What the JSON holds; `save` is given what there is of it after each number of requests: a run cut short leaves that."""
    import torch
    import vllm

    most = max(settings.concurrency)
    common = timed_arguments(prompts, settings.max_tokens, most, settings.dtype, settings.enforce_eager)
    if settings.replay is not None:
        common["load_format"] = "dummy"
    on_gpu = torch.cuda.is_available()
    # A GPU is shared out among the engines, which all live at once; on a CPU each has its gigabyte.
    common |= {"gpu_memory_utilization": 0.9 / len(chosen)} if on_gpu else {"kv_cache_memory_bytes": 1 << 30}
    with ExitStack() as stack:
        variants: dict[str, Answer] = {}
        host_bytes: dict[str, Callable[[], int]] = {}
        device_mib: dict[str, int] = {}
        for name, options in chosen.items():
            print(f"starting {name} ...", file=sys.stderr, flush=True)
            start, before = server_side if settings.http else engine_side, device_bytes()
            variants[name], host_bytes[name] = stack.enter_context(start(settings.model, common | options))
            variants[name](_asks(settings, prompts, 2, 0), 2)
            device_mib[name] = (device_bytes() - before) >> 20
        shown = {
            "model": Path(settings.model).name,
            "head": Path(settings.head).name,
            "prompts": str(settings.prompts or report.BUILT_IN),
            "prefix_caching": common["enable_prefix_caching"],
        }
        result: dict[str, Any] = {
            "concurrency": {},
            "settings": asdict(settings) | shown,
            "cores": os.cpu_count(),
            "machine": torch.cuda.get_device_name() if on_gpu else cpu(),
            "versions": {
                "vllm-eagle": version("vllm-eagle"),
                "vllm": vllm.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "device_mib": device_mib if on_gpu else None,
            "note": None if on_gpu else mended.note(chosen, settings.temperature, not settings.http),
        }
        for number in settings.concurrency:
            rounds = []
            for turn in range(settings.rounds):
                rounds.append(_round(variants, settings, prompts, number, turn))
                _progress(f"{number} at once, round {turn + 1} of {settings.rounds}", rounds[-1:])
            _progress(f"{number} at once, medians", rounds)
            result["concurrency"][str(number)] = {name: _summary(rounds, name) for name in variants}
            result["host_mib"] = {name: look() >> 20 for name, look in host_bytes.items()}
            if save is not None:
                save(result)
    return result


def cpu() -> str:
    """Its name, and what of it decides how many tokens a pass holds for nothing."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    known = {name.strip(): value.split() for name, value in found.items()}
    fast = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in known.get("flags", [])]
    return " ".join([*(known.get("model name") or [platform.machine()]), *fast])


def _round(
    variants: dict[str, Answer], settings: Settings, prompts: list[list[int]], number: int, turn: int
) -> dict[str, Generated]:
    found = {}
    for name in order(list(variants), turn):
        time.sleep(_SETTLE_S)
        found[name] = variants[name](_asks(settings, prompts, number, turn), number)
    return {name: found[name] for name in variants}


def order(names: list[str], turn: int) -> list[str]:
    """Who answers when: there and back, then the same from the next one on, so that nobody always follows the same one."""
    shift = turn // 2 % len(names)
    shifted = names[shift:] + names[:shift]
    return shifted[::-1] if turn % 2 else shifted


def _asks(settings: Settings, prompts: list[list[int]], number: int, turn: int) -> list[Ask]:
    """What so many users ask in a round; every round asks others, as long as there are others."""
    # A few users ask four times, many about twice.
    count = max(_FEWEST, min(4 * number, 2 * number + 16))
    # First answers end after each other: users of a server are not in step. If they all began at once, plain decoding would keep
    # them so, and compute all prompts of its next answers in one pass.
    lengths = [-(-settings.max_tokens * min(i + 1, number) // number) for i in range(count)]
    return [
        Ask(prompts[i % len(prompts)], settings.temperature, settings.seed + i, max(2, length))
        for i, length in enumerate(lengths, turn * count)
    ]


def _summary(rounds: Sequence[dict[str, Generated]], name: str) -> dict[str, Any]:
    """Medians over the rounds of one variant."""
    mine, plain = [each[name] for each in rounds], [each[PLAIN] for each in rounds]
    rates = [found.tokens_per_s for found in mine]
    ratios = [rate / base.tokens_per_s for rate, base in zip(rates, plain, strict=True)]
    pairs = [pair for found, base in zip(mine, plain, strict=True) for pair in zip(found.answers, base.answers, strict=True)]
    following = _milliseconds([x for found in mine for x in found.next_token_s])
    gaps = [gap for found in mine for gap in found.gaps_s]
    return {
        "tokens_per_s": round(statistics.median(rates), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "tau": round(statistics.median(found.tau for found in mine), 3),
        "first_token_ms": _milliseconds([x for found in mine for x in found.first_token_s]),
        # Of each answer the mean over its tokens; how long a reader waits for more of it is in gap_ms.
        "next_token_ms": following,
        "gap_ms": _milliseconds(gaps) if gaps else None,
        "answer_tokens_per_s": round(1000 / max(following["p50"], 1e-3), 2),
        "identical": sum(one == other for one, other in pairs),
        "answers": len(pairs),
    }


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    import numpy as np

    return {f"p{q}": round(1000 * float(np.percentile(seconds, q)), 2) for q in (50, 99)}


def _progress(what: str, rounds: Sequence[dict[str, Generated]]) -> None:
    """A line on stderr: medians over some rounds."""
    found = {name: _summary(rounds, name) for name in rounds[0]}
    each = "  ".join(f"{name} {x['tokens_per_s']:.1f} tokens/s ({x['ratio']:.2f}x)" for name, x in found.items())
    print(f"{what}: {each}", file=sys.stderr, flush=True)
