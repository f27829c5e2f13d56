"""Tokens per target pass on the same prompts: plain vLLM, vLLM's own EAGLE chain, and our chains and trees.

Acceptance length is a property of models and algorithm, not of the machine, so every variant runs once. Tokens of our variants
are compared with plain vLLM's; where they differ, the two tokens' scores are looked up in plain vLLM: in float32 no difference is
expected, in bfloat16 two scores may be so close that rounding decides. Prompts that say their kind run kind by kind, and tau stands
apart for each.
"""

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eagle.bench.engines import mended
from vllm_eagle.bench.engines.drafters import ours, vllm_chain, vllm_medusa, vllm_ngram
from vllm_eagle.bench.engines.offline import Generated, encode_with_kinds, engine, generate_by_kind, prepare_environment
from vllm_eagle.bench.passes.gaps import gaps

if TYPE_CHECKING:
    from vllm import SamplingParams

CHAIN_SIZES = (3, 5)
MAX_NUM_SEQS = 64
NGRAM, NGRAM_SIZE = "vllm_ngram", 5
SIZES = (2, 3, 5, 8, 16, 32, 60)  # trees and chains of as many nodes


@dataclass(frozen=True, slots=True)
class Settings:
    """What to compare, as on the command line."""

    model: str
    head: str
    prompts: Path | None
    limit: int | None
    temperature: float
    seed: int
    max_tokens: int
    dtype: str
    only: list[str] | None
    medusa: str | None = None
    attention_backend: str | None = None  # on GPUs; None: vLLM's choice, or that of the trees
    chat_template_kwargs: dict[str, Any] | None = None


def variants(head: str, temperature: float, medusa: str | None = None) -> dict[str, dict[str, Any]]:
    """Engine arguments by name of variant."""

    named = {f"vllm_chain{size}": vllm_chain(head, size) for size in CHAIN_SIZES}
    if medusa is not None:
        chain = vllm_medusa(medusa)
        named[f"vllm_medusa{chain['speculative_config']['num_speculative_tokens']}"] = chain
    for suffix, options in (("", {}), ("_uncoupled", {"coupled": False})):
        if suffix and temperature == 0:
            break  # no noise to couple to
        for size in SIZES:
            named[f"chain{size}{suffix}"] = ours(head, size, budget=False, mode="chain", **options)
        named[f"static{suffix}"] = ours(head, 16, budget=False, mode="static", **options)
        for size in SIZES:
            named[f"tree{size}{suffix}"] = ours(head, size, budget=False, **options)
    if temperature == 0:
        named[f"{NGRAM}{NGRAM_SIZE}"] = vllm_ngram(NGRAM_SIZE)
    return named


def run(settings: Settings, json_path: Path | None) -> int:
    """Run all variants, print a table and one JSON line. Returns 1 if our tokens differ in float32."""
    chosen = variants(settings.head, settings.temperature, settings.medusa)
    unknown = [name for name in settings.only or [] if name not in chosen]
    if unknown:
        raise ValueError(f"--only: unknown variant {', '.join(unknown)}; known: {', '.join(chosen)}")
    if settings.only:
        chosen = {name: chosen[name] for name in settings.only}
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise ValueError(f"--json {json_path}: its folder does not exist; create it first")
    if settings.max_tokens < 1 or settings.temperature < 0:
        raise ValueError("--max-tokens must be at least 1 and --temperature at least 0")
    prepare_environment()
    prompts, kinds = encode_with_kinds(
        settings.model, settings.prompts, settings.limit, settings.chat_template_kwargs, settings.max_tokens + 1
    )
    result = measure(settings, prompts, chosen, kinds)
    line = json.dumps(result)
    if json_path is not None:
        json_path.write_text(line + "\n")
    print(line)
    return int(settings.dtype == "float32" and result["identical"] < result["prompts"])


def measure(
    settings: Settings,
    prompts: list[list[int]],
    chosen: dict[str, dict[str, Any]],
    kinds: Sequence[str | None] | None = None,  # of the prompts
) -> dict[str, Any]:
    """Run plain vLLM and the chosen variants; prints a table and returns what the JSON holds."""
    import torch
    import vllm
    from vllm import SamplingParams

    common = {
        "dtype": settings.dtype,
        "max_model_len": max(map(len, prompts)) + settings.max_tokens + 1,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 30,
        "max_num_seqs": MAX_NUM_SEQS,
        # vLLM 0.32 on CPU fails when the prompt of a seeded request is split over two steps, so all must fit into one.
        "max_num_batched_tokens": sum(sorted(map(len, prompts))[-MAX_NUM_SEQS:]) + MAX_NUM_SEQS * (max(SIZES) + 1),
    }
    backend = {} if settings.attention_backend is None else {"attention_backend": settings.attention_backend}
    if settings.attention_backend == "CUSTOM":  # which is ours: without trees vLLM does not know it
        chosen = {name: options if name.startswith("vllm_") else options | backend for name, options in chosen.items()}
    else:
        common |= backend
    params = [
        SamplingParams(temperature=settings.temperature, seed=settings.seed + i, max_tokens=settings.max_tokens)
        for i in range(len(prompts))
    ]
    kinds = [None] * len(prompts) if kinds is None else kinds
    if note := mended.note(chosen, settings.temperature, in_process=True):
        mended.mend_sampled_chains()
        print(note, file=sys.stderr)
    with engine(settings.model, **common) as llm:
        plain, plain_by_kind = generate_by_kind(llm, prompts, params, kinds)
    by_kind: dict[str, dict[str, Any]] = {
        kind: {"prompts": len(part.texts), "tokens": part.tokens, "tau": {}} for kind, part in plain_by_kind.items()
    }
    print(f"{len(prompts)} prompts, {sum(map(len, plain.token_ids))} tokens, T={settings.temperature:g}, {settings.dtype}")
    titles = "".join(f"{kind:>{_width(kind)}}" for kind in by_kind)
    print(f"{'variant':<18}{'tau':>7}{'identical':>12}{'seconds':>10}{titles}")
    print(f"{'plain':<18}{1.0:>7.2f}{'':>12}{plain.seconds:>10.1f}", flush=True)
    same_in_all = [True] * len(prompts)
    tau, seconds = {}, {"plain": round(plain.seconds, 2)}
    differing: dict[str, Generated] = {}
    gaps_by_name: dict[str, list[float]] | None = None
    # N-gram lookup goes last: it imports numba, and vLLM 0.32 on CPU, which looks through all modules for kernels when an engine
    # starts, then fails in a module of numba's.
    for name in sorted(chosen, key=lambda name: name.startswith(NGRAM)):
        if gaps_by_name is None and name.startswith(NGRAM):
            gaps_by_name = _gaps(settings, common, prompts, params, plain, differing)
        with engine(settings.model, **common, **chosen[name]) as llm:
            found, parts = generate_by_kind(llm, prompts, params, kinds)
        same = [a == b for a, b in zip(plain.token_ids, found.token_ids, strict=True)]
        taus = "".join(f"{part.tau:>{_width(kind)}.2f}" for kind, part in parts.items())
        print(f"{name:<18}{found.tau:>7.2f}{f'{sum(same)}/{len(same)}':>12}{found.seconds:>10.1f}{taus}", flush=True)
        tau[name], seconds[name] = round(found.tau, 4), round(found.seconds, 2)
        for kind, part in parts.items():
            by_kind[kind]["tau"][name] = round(part.tau, 4)
        if not name.startswith("vllm_"):
            same_in_all = [a and b for a, b in zip(same_in_all, same, strict=True)]
            if not all(same):
                differing[name] = found
    return {
        "prompts": len(prompts),
        "identical": sum(same_in_all),
        "tau": tau,
        **({"by_kind": by_kind} if by_kind else {}),
        "seconds": seconds,
        "tokens": sum(map(len, plain.token_ids)),
        "gaps": _gaps(settings, common, prompts, params, plain, differing) if gaps_by_name is None else gaps_by_name,
        "settings": {
            "model": Path(settings.model).name,
            "head": Path(settings.head).name,
            "temperature": settings.temperature,
            "seed": settings.seed,
            "max_tokens": settings.max_tokens,
            "dtype": settings.dtype,
            "attention_backend": settings.attention_backend,
            "chat_template_kwargs": settings.chat_template_kwargs,
        },
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _width(kind: str) -> int:
    """Of a kind's column."""
    return max(len(kind) + 2, 7)


def _gaps(
    settings: Settings,
    common: dict[str, Any],
    prompts: Sequence[list[int]],
    params: Sequence["SamplingParams"],
    plain: Generated,
    differing: dict[str, Generated],
) -> dict[str, list[float]]:
    """Per variant that differs: see `gaps`."""
    if not differing:
        return {}
    with engine(settings.model, **common, max_logprobs=-1) as llm:
        found = {name: gaps(llm, prompts, params, plain, other) for name, other in differing.items()}
    print("gaps at first differences:", json.dumps(found), file=sys.stderr)
    return found
