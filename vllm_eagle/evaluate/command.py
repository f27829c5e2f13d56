"""`vllm-eagle eval`: alpha per depth, calibration, and the tau to expect of draft trees; of all prompts, and of each kind."""

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vllm_eagle import files
from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.bench.engines.offline import encode_with_kinds, places_by_kind
from vllm_eagle.evaluate import calibration
from vllm_eagle.evaluate.accuracy import ALPHA_DEPTH
from vllm_eagle.evaluate.measured import measure, nothing
from vllm_eagle.evaluate.texts import write_answers
from vllm_eagle.heads.window import window_of
from vllm_eagle.train.data.template import parse_arguments
from vllm_eagle.train.features.target import FrozenTarget
from vllm_eagle.train.head.files import load_head
from vllm_eagle.train.head.medusa import MedusaHead


@dataclass(frozen=True, slots=True)
class EvalSettings:
    """What to evaluate, as on the command line."""

    target: str
    head: Path
    prompts: Path | None
    limit: int | None
    num_draft_tokens: tuple[int, ...]
    mode: str
    temperature: float
    seed: int
    max_tokens: int
    dtype: str
    batch: int
    out: Path | None
    chat_template_kwargs: dict[str, Any] | None = None
    draft_window: int | None = None

    def trees(self) -> dict[str, TreeConfig]:
        """Tree options by name, e.g. tree16 as in `compare`.

        Raises:
            ValueError: a size or mode that cannot be.
        """
        word = {"dynamic": "tree", "chain": "chain", "static": "static"}[self.mode]
        return {
            f"{word}{n}": TreeConfig.from_options(n, {"mode": self.mode, "draft_window": self.draft_window})
            for n in self.num_draft_tokens
        }


def evaluate(settings: EvalSettings, trees: dict[str, TreeConfig] | None = None, progress: bool = False) -> dict[str, Any]:
    """Run the evaluation; returns what the JSON holds. Writes reliability.png and eval.json to `settings.out`.

    Args:
        settings: what to evaluate.
        trees: other trees than those of `settings`, by name.
        progress: show a bar.

    Raises:
        ValueError: target, head or prompts cannot be used.
    """
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    trees = trees or settings.trees()
    if settings.limit is not None and settings.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {settings.limit}")
    if settings.max_tokens < 2 or settings.temperature < 0 or settings.batch < 1:
        raise ValueError("--max-tokens must be at least 2, --batch at least 1 and --temperature at least 0")
    target = FrozenTarget(settings.target, getattr(torch, settings.dtype), "cuda" if torch.cuda.is_available() else "cpu")
    head = load_head(settings.head, target).to(target.device).eval()
    for parameter in head.parameters():  # not the buffers: rotary angles stay float32, as in vLLM
        parameter.data = parameter.data.to(target.dtype)
    positions = getattr(target.config, "max_position_embeddings", None) or sys.maxsize
    windows = {name: window_of(config.draft_window, settings.head, positions) for name, config in trees.items()}
    trees = {name: replace(config, draft_window=windows[name]) for name, config in trees.items()}
    margin = max([ALPHA_DEPTH, *(config.depth_limit for config in trees.values())]) + 1
    prompts, kinds = encode_with_kinds(
        settings.target, settings.prompts, settings.limit, settings.chat_template_kwargs, settings.max_tokens + margin
    )
    num_batches = -(-len(prompts) // settings.batch)
    with tqdm(desc="answers", unit=" steps", total=num_batches * (settings.max_tokens + margin), disable=not progress) as bar:
        texts = write_answers(
            target, prompts, settings.max_tokens, margin, settings.temperature, settings.seed, settings.batch, bar.update
        )
    groups = {kind: [texts[i] for i in places] for kind, places in places_by_kind(kinds).items()}
    if isinstance(head, MedusaHead):  # whose tokens do not depend on each other: there is no tree of features to grow
        trees = {}
    whole, apart = nothing(head, trees), {}
    num_batches = sum(-(-len(some) // settings.batch) for some in groups.values())
    with tqdm(desc="drafting", unit=" batches", total=len(trees) * num_batches, disable=not progress or not trees) as bar:
        for kind, some in groups.items():
            part = measure(target, head, some, trees, settings.temperature, settings.batch, bar.update)
            if kind is not None:
                apart[kind] = part.as_dict()
            whole.merge(part)
    result = whole.as_dict()
    if apart:
        result["by_kind"] = apart
    curves = {name: calibration.reliability(r.confidences, r.accepted) for name, r in whole.replays.items()}
    for name, curve in curves.items():
        result["trees"][name]["calibration"] = curve.as_dict()
    if settings.out is not None and curves:
        settings.out.mkdir(parents=True, exist_ok=True)
        calibration.draw(curves, settings.out / "reliability.png")
    names = ("temperature", "seed", "max_tokens", "dtype", "mode", "chat_template_kwargs", "draft_window")
    result["settings"] = {"target": Path(settings.target).name, "head": settings.head.name} | {
        n: getattr(settings, n) for n in names
    }
    if settings.out is not None:
        settings.out.mkdir(parents=True, exist_ok=True)
        files.write_text(settings.out / "eval.json", json.dumps(result) + "\n")
    return result


def alpha_table(result: dict[str, Any]) -> str:
    """Alpha per depth, as `eval` prints it."""
    lines = [f"{'alpha':<20}" + "".join(f"{i:>8}" for i in range(len(result["alpha_free_running"])))]
    for kind in ("teacher_forced", "free_running"):
        lines.append(f"{kind.replace('_', '-'):<20}" + "".join(f"{alpha:>8.3f}" for alpha in result[f"alpha_{kind}"]))
    return "\n".join(lines)


def kind_table(result: dict[str, Any]) -> str:
    """Teacher-forced alpha per depth and tau of each tree, one line per kind of prompts."""
    kinds, trees = result["by_kind"], list(result.get("trees", {}))
    width = max(20, *(len(kind) + 2 for kind in kinds))
    depths = len(result["alpha_teacher_forced"])
    titles = ["prompts", "alpha 0", *map(str, range(1, depths)), *(f"tau {name}" for name in trees)]
    widths = [9] * (1 + depths) + [max(len(name) + 6, 9) for name in trees]
    rows = [("kind", titles)]
    for kind, found in kinds.items():
        cells = [str(found["prompts"]), *(f"{alpha:.3f}" for alpha in found["alpha_teacher_forced"])]
        rows.append((kind, cells + [f"{found['trees'][name]['tau']:.2f}" for name in trees]))
    return "\n".join(
        f"{name:<{width}}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True)) for name, cells in rows
    )


def run(args: argparse.Namespace, target: str, head: str) -> int:
    """Evaluate; a table, then one JSON line."""
    settings = EvalSettings(
        target=target,
        head=Path(head),
        prompts=args.prompts,
        limit=args.limit,
        num_draft_tokens=tuple(args.num_draft_tokens),
        mode=args.mode,
        temperature=args.temperature,
        seed=args.seed,
        max_tokens=args.max_tokens,
        dtype=args.dtype,
        batch=args.batch,
        out=args.out,
        chat_template_kwargs=parse_arguments(args.chat_template_kwargs),
        draft_window=args.draft_window,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    start = time.perf_counter()
    result = evaluate(settings)
    print(f"{result['prompts']} prompts, {result['tokens']} tokens, T={settings.temperature:g}, {settings.dtype}, "
          f"{time.perf_counter() - start:.0f} s")  # fmt: skip
    print(alpha_table(result))
    entropy, certainty = result["target_entropy_nats"], result["target_largest_probability"]
    classes = ", ".join(
        "{share:.0%} at {likeliest[0]:g} to {likeliest[1]:g}: {alpha_0:.3f}".format(**found)
        for found in result["alpha_0_by_certainty"]
    )
    print(f"target: {entropy:.2f} nats per token, its likeliest token has {certainty:.2f} on average")
    print(f"alpha 0 by how likely that is: {classes}")
    for name, tree in result.get("trees", {}).items():
        print(f"{name:<20}tau {tree['tau']:.2f} ({tree['tau_by_confidence']:.2f} by the head's own confidence, "
              f"calibration error {tree['calibration']['error']:.3f})")  # fmt: skip
    if "by_kind" in result:
        print(kind_table(result))
    print(json.dumps(result))
    return 0
