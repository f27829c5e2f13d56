"""What the papers' choices are worth on a pair of your own: short trainings that differ in one thing each.

    python -m vllm_eagle.bench.heads.ablation --target MODEL --data FILE [FILE ...] --out DIR [--only VARIANT ...]

Every variant sees the same batches for the same number of steps and is measured on the target's own answers to held-out prompts, at
T = 0 and at T = 1 (coupled), teacher-forced and free-running. One JSON file per variant; at the end one of all in DIR,
and a table.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vllm_eagle.bench.engines.offline import encode_prompts
from vllm_eagle.evaluate.accuracy import ALPHA_DEPTH, measure_accuracy
from vllm_eagle.evaluate.texts import Text, read_texts, write_answers
from vllm_eagle.train.features.target import FrozenTarget
from vllm_eagle.train.head.files import load_head
from vllm_eagle.train.head.models import aux_layers
from vllm_eagle.train.run.loop import train
from vllm_eagle.train.run.settings import DEFAULT_WEIGHTS, Method, TrainSettings

# name -> what it is, kind of head, changed loss weights
VARIANTS: dict[str, tuple[str, Method, dict[str, Any]]] = {
    "eagle": ("EAGLE-1 as published: next token, noise 0.1, regression 1 + classification 0.1", "eagle", {}),
    "eagle_unshifted": ("... the feature's own token instead of the next", "eagle", {"token_shift": 0}),
    "eagle_no_noise": ("... without noise", "eagle", {"noise": 0.0}),
    "eagle_regression_only": ("... without the classification loss", "eagle", {"classification": 0.0}),
    "eagle_classification_1": ("... classification weighs 1", "eagle", {"classification": 1.0}),
    "eagle_classification_only": ("... without the feature loss", "eagle", {"classification": 1.0, "regression": 0.0}),
    "eagle_unrolled3": ("... unrolled 3 steps", "eagle", {"num_steps": 3}),
    "eagle_unrolled3_classification_only": (
        "... unrolled 3 steps, without the feature loss",
        "eagle",
        {"num_steps": 3, "classification": 1.0, "regression": 0.0, "noise": 0.0},
    ),
    "eagle3_1": ("EAGLE-3, 1 step: never on its own outputs", "eagle3", {"num_steps": 1}),
    "eagle3_3": ("EAGLE-3, 3 steps", "eagle3", {"num_steps": 3}),
    "eagle3_5": ("EAGLE-3, 5 steps", "eagle3", {"num_steps": 5}),
    "medusa": ("Medusa, 5 heads", "medusa", {}),
}


def run_variant(name: str, base: TrainSettings, target: FrozenTarget, answers: dict[float, list[Text]]) -> dict[str, Any]:
    """Train one variant below `base.out` and measure it on the target's answers, by temperature."""
    _, method, changes = VARIANTS[name]
    weights = replace(DEFAULT_WEIGHTS[method], **changes)
    settings = replace(base, method=method, weights=weights, out=base.out / name)
    card = train(settings)
    head = load_head(settings.out, target).eval()
    result: dict[str, Any] = {"steps": settings.steps, "tokens": card["result"]["tokens"], "seconds": card["result"]["seconds"]}
    for temperature, texts in answers.items():
        batches = list(read_texts(target, texts, aux_layers(head.config)))
        result[f"T={temperature:g}"] = measure_accuracy(
            target, head, batches, ALPHA_DEPTH, temperature, weights.token_shift
        ).as_dict()
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: teacher-forced alphas at T = 0, tau of a chain of 5, and both at T = 1."""
    lines = ["| training | alpha 0 | 1 | 2 | 3 | 4 | chain of 5 | T = 1: alpha 0 | chain of 5 |", "|" + "---|" * 9]
    for name, (text, _, _) in VARIANTS.items():
        if name in results:
            greedy, sampled = results[name]["T=0"], results[name]["T=1"]
            alphas = " | ".join(f"{a:.3f}" for a in greedy["alpha_teacher_forced"])
            rest = f"{greedy['tau_chain5']:.2f} | {sampled['alpha_teacher_forced'][0]:.3f} | {sampled['tau_chain5']:.2f}"
            lines.append(f"| {text} | {alphas} | {rest} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--draft-vocab", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, default=128, help="per measured answer")
    args = parser.parse_args()
    base = TrainSettings(
        target=args.target,
        data=tuple(args.data),
        out=args.out,
        steps=args.steps,
        batch_tokens=args.batch_tokens,
        lr=args.lr,
        draft_vocab=args.draft_vocab,
        max_length=1024,
        eval_every=args.steps,
        checkpoint_every=args.steps,
    )
    target = FrozenTarget(args.target, torch.float32)
    prompts = encode_prompts(args.target, None)
    answers = {t: write_answers(target, prompts, args.max_tokens, ALPHA_DEPTH + 1, t) for t in (0.0, 1.0)}
    for name in args.only:
        if (args.out / f"{name}.json").exists():
            print(f"{name}: done before")
            continue
        result = run_variant(name, base, target, answers)
        (args.out / f"{name}.json").write_text(json.dumps(result) + "\n")
    results = {name: json.loads(path.read_text()) for name in VARIANTS if (path := args.out / f"{name}.json").exists()}
    (args.out / "ablation.json").write_text(json.dumps(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
