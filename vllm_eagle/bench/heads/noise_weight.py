"""How much the noise should weigh beside a head's logits in coupled drafting.

    python -m vllm_eagle.bench.heads.noise_weight [--real | --model MODEL] [--head HEAD] --json FILE

Along answers that the target samples, trees of 16 are drafted as a server would draft them (evaluate/simulate.py), once per weight
(algorithm/draft.py, NOISE_WEIGHT).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_eagle.algorithm import draft
from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.bench.engines.offline import BUILT_IN_PROMPTS, encode_prompts
from vllm_eagle.evaluate.simulate import replay
from vllm_eagle.evaluate.texts import read_texts, write_answers
from vllm_eagle.train.features.target import FrozenTarget
from vllm_eagle.train.head.files import load_head
from vllm_eagle.train.head.models import Head, aux_layers

WEIGHTS = (1.0, 0.85, 0.7, 0.55)
TREE = TreeConfig.from_options(16, {})


def measure(
    target: FrozenTarget,
    head: Head,
    prompts: Sequence[list[int]],
    temperatures: Sequence[float],
    weights: Sequence[float],
    max_tokens: int,
) -> dict[str, dict[str, Any]]:
    """By temperature and weight: what became of the trees."""
    found: dict[str, dict[str, Any]] = {}
    usual = draft.NOISE_WEIGHT
    for temperature in temperatures:
        texts = write_answers(target, prompts, max_tokens, TREE.depth_limit + 1, temperature)
        reads = list(read_texts(target, texts, aux_layers(head.config)))
        by_weight = found[f"{temperature:g}"] = {}
        for weight in weights:
            draft.NOISE_WEIGHT = weight
            try:
                by_weight[f"{weight:g}"] = replay(head, reads, TREE, temperature).as_dict()
            finally:
                draft.NOISE_WEIGHT = usual
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown: tau, a row per temperature, a column per weight."""
    weights = list(next(iter(result["temperatures"].values())))
    lines = ["| | " + " | ".join(weights) + " |", "|" + "---|" * (1 + len(weights))]
    for temperature, by_weight in result["temperatures"].items():
        lines.append(f"| T = {temperature} | " + " | ".join(f"{by_weight[weight]['tau']:.2f}" for weight in weights) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    from vllm_eagle.pair import HEAD, REAL_HEAD, TARGET
    from vllm_eagle.pair.real import real_target

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M-Instruct")
    parser.add_argument("--model", help="(default: the shipped one)")
    parser.add_argument("--head", type=Path, help="for it (default: the shipped one)")
    parser.add_argument("--prompts", type=Path, default=BUILT_IN_PROMPTS)
    parser.add_argument("--every", type=int, default=1, help="use one prompt of so many (default %(default)s)")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 1.0])
    parser.add_argument("--weights", type=float, nargs="+", default=WEIGHTS)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    model = args.model or str(real_target() if args.real else TARGET)
    target = FrozenTarget(model, torch.float32)
    head = load_head(args.head or (REAL_HEAD if args.real else HEAD), target).eval().float()
    prompts = encode_prompts(model, args.prompts)[:: args.every]
    with torch.inference_mode():
        found = measure(target, head, prompts, args.temperatures, args.weights, args.max_tokens)
    result = {"target": Path(model).name, "prompts": len(prompts), "max_tokens": args.max_tokens, "temperatures": found}
    args.json.write_text(json.dumps(result) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
