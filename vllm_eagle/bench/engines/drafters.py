"""Engine arguments of our trees and of the drafters that vLLM has itself: one place for all benchmarks."""

import json
from pathlib import Path
from typing import Any

from vllm_eagle.algorithm.config import CONFIG_KEY
from vllm_eagle.heads.checkpoint import read_config
from vllm_eagle.options.engine_args import serve_head


def ours(head: str, num_draft_tokens: int | None, **options: Any) -> dict[str, Any]:
    """Draft trees of at most so many nodes, None: as users get them; `options` as in additional_config."""
    size = {} if num_draft_tokens is None else {"spec_tokens": num_draft_tokens}
    return {"spec_model": head, **size, "additional_config": {CONFIG_KEY: options}}


def vllm_chain(head: str, num_draft_tokens: int, adaptive: bool = False) -> dict[str, Any]:
    """vLLM's own EAGLE; with `adaptive` it verifies as much of its chains as pays (on GPUs, with full CUDA graphs)."""
    folder, method = serve_head(head)
    settings = {"method": method, "model": folder, "num_speculative_tokens": num_draft_tokens}
    return {"speculative_config": settings | ({"enable_adaptive_verification": True} if adaptive else {})}


def vllm_ngram(num_draft_tokens: int) -> dict[str, Any]:
    """vLLM's prompt lookup: the nearest to Lookahead that it has."""
    lookup = {"method": "ngram", "num_speculative_tokens": num_draft_tokens, "prompt_lookup_max": 4, "prompt_lookup_min": 1}
    return {"speculative_config": lookup}


def vllm_medusa(heads: str) -> dict[str, Any]:
    """vLLM's Medusa, as many drafts as there are heads.

    Raises:
        ValueError: the folder holds no Medusa heads.
    """
    number = read_config(Path(heads)).get("num_heads")
    if not isinstance(number, int):
        raise ValueError(f"--medusa {heads}: its config.json names no num_heads, so these are no Medusa heads")
    return {"speculative_config": {"method": "medusa", "model": heads, "num_speculative_tokens": number}}


def flags(arguments: dict[str, Any]) -> list[str]:
    """Engine arguments as options of `vllm serve`; true is a flag, false its --no- twin, None is left out."""
    found = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            found += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return found
