"""`vllm-eagle eval`: alpha per depth, calibration, and the tau to expect of draft trees."""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.bench.engines.offline import encode_prompts
from vllm_eagle.evaluate import calibration
from vllm_eagle.evaluate.accuracy import ALPHA_DEPTH, measure_accuracy
from vllm_eagle.evaluate.simulate import Replay, replay
from vllm_eagle.evaluate.texts import Read, read_texts, write_answers
from vllm_eagle.train.features.target import FrozenTarget
from vllm_eagle.train.head.files import load_head
from vllm_eagle.train.head.medusa import MedusaHead
from vllm_eagle.train.head.models import aux_layers


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

    def trees(self) -> dict[str, TreeConfig]:
        """Tree options by name, e.g. tree16 as in `compare`.

        Raises:
            ValueError: a size or mode that cannot be.
        """
        word = {"dynamic": "tree", "chain": "chain", "static": "static"}[self.mode]
        return {f"{word}{n}": TreeConfig.from_options(n, {"mode": self.mode}) for n in self.num_draft_tokens}


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
    depth = head.max_steps or ALPHA_DEPTH
    prompts = encode_prompts(settings.target, settings.prompts, settings.limit)
    margin = max([ALPHA_DEPTH, *(config.depth_limit for config in trees.values())]) + 1
    longest = max(map(len, prompts)) + settings.max_tokens + margin
    if longest > target.config.max_position_embeddings:
        raise ValueError(
            f"--max-tokens {settings.max_tokens} after the longest prompt makes {longest} tokens, the target takes "
            f"{target.config.max_position_embeddings}; lower it or leave out long prompts"
        )
    num_batches = -(-len(prompts) // settings.batch)
    with tqdm(desc="answers", unit=" steps", total=num_batches * (settings.max_tokens + margin), disable=not progress) as bar:
        texts = write_answers(
            target, prompts, settings.max_tokens, margin, settings.temperature, settings.seed, settings.batch, bar.update
        )
    aux = aux_layers(head.config)
    batches = list(read_texts(target, texts, aux, settings.batch))
    accuracy = measure_accuracy(target, head, batches, depth, settings.temperature)
    result: dict[str, Any] = {"prompts": len(prompts), "tokens": sum(text.num_answer for text in texts)} | accuracy.as_dict()
    if not isinstance(head, MedusaHead):  # whose tokens do not depend on each other: there is no tree of features to grow
        with tqdm(desc="drafting", unit=" batches", total=len(trees) * len(batches), disable=not progress) as bar:
            replays = {name: replay(head, _counted(batches, bar), config, settings.temperature) for name, config in trees.items()}
        curves = {name: calibration.reliability(r.confidences, r.accepted) for name, r in replays.items()}
        result["trees"] = {name: _tree_result(r) | {"calibration": curves[name].as_dict()} for name, r in replays.items()}
        if settings.out is not None:
            settings.out.mkdir(parents=True, exist_ok=True)
            calibration.draw(curves, settings.out / "reliability.png")
    names = ("temperature", "seed", "max_tokens", "dtype", "mode")
    result["settings"] = {"target": Path(settings.target).name, "head": settings.head.name} | {
        n: getattr(settings, n) for n in names
    }
    if settings.out is not None:
        settings.out.mkdir(parents=True, exist_ok=True)
        (settings.out / "eval.json").write_text(json.dumps(result) + "\n")
    return result


def alpha_table(result: dict[str, Any]) -> str:
    """Alpha per depth, as `eval` prints it."""
    lines = [f"{'alpha':<20}" + "".join(f"{i:>8}" for i in range(len(result["alpha_free_running"])))]
    for kind in ("teacher_forced", "free_running"):
        lines.append(f"{kind.replace('_', '-'):<20}" + "".join(f"{alpha:>8.3f}" for alpha in result[f"alpha_{kind}"]))
    return "\n".join(lines)


def _counted(batches: list[Read], bar: Any) -> Iterator[Read]:
    for batch in batches:
        yield batch
        bar.update()


def _tree_result(found: Replay) -> dict[str, Any]:
    return {
        "tau": round(found.tau, 4),
        "tau_by_confidence": round(found.expected_tau, 4),
        "steps": found.num_steps,
        "nodes_per_step": round(found.num_nodes / max(1, found.num_steps), 2),
    }


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
    print(json.dumps(result))
    return 0
