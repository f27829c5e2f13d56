"""What an EAGLE-1 head gains and loses with draft vocabularies of several sizes.

    python -m vllm_eagle.bench.heads.draft_vocab --model MODEL --head HEAD --data FILE [FILE ...] --sizes 32768 16384 8192 4096

FILE holds dialogues that the target has written; their answers are counted. Of each size, and of the whole vocabulary: the share of
tokens that it covers in plain vLLM's answers to the prompts, tau and output tokens per second of trees without the budget (engines
that live at once take turns, as in `vllm-eagle bench`), and the milliseconds that the head takes per step and per level. Last: a
line of JSON.
"""

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.bench.engines.drafters import ours
from vllm_eagle.bench.engines.offline import encode_prompts, engine, generate, prepare_environment, timed_arguments
from vllm_eagle.bench.speed.steps import StepWatch, measure_rates, summary
from vllm_eagle.bench.speed.throughput import PLAIN, Settings
from vllm_eagle.bench.speed.throughput import measure as measure_speed
from vllm_eagle.heads import draft_vocab
from vllm_eagle.train.features.target import load_config
from vllm_eagle.train.run.draft_vocab import choose

WHOLE = "whole"
NUM_DRAFT_TOKENS = 16


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What the JSON holds; heads with other vocabularies are written to `folder`."""
    variants: dict[str, dict[str, Any]] = {WHOLE: ours(str(args.head), NUM_DRAFT_TOKENS, budget=False, draft_vocab=False)}
    counted: dict[str, float] = {}
    for size in args.sizes:
        head = folder / str(size)
        shutil.copytree(args.head, head)
        counted[str(size)] = choose(head, str(args.model), args.data, size)
        variants[str(size)] = ours(str(head), NUM_DRAFT_TOKENS, budget=False)
    settings = Settings(
        model=str(args.model),
        head=str(args.head),
        prompts=args.prompts,
        temperature=args.temperature,
        seed=0,
        max_tokens=args.max_tokens,
        dtype=args.dtype,
        concurrency=(1,),
        rounds=args.rounds,
        num_draft_tokens=NUM_DRAFT_TOKENS,
        only=None,
        threads=args.threads,
    )
    prompts = encode_prompts(str(args.model), args.prompts, args.limit)
    found = measure_speed(settings, prompts, {PLAIN: {}} | variants)
    common = timed_arguments(prompts, args.max_tokens, 1, args.dtype, False) | {"kv_cache_memory_bytes": 1 << 30}
    levels = TreeConfig.from_options(NUM_DRAFT_TOKENS, {}).depth_limit  # which all grow without the budget
    rows = {}
    for name, options in variants.items():
        # In a process each: engines that compile one after the other in the same one disturb each other.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            head_ms = process.submit(_head_ms, args, prompts, common | options).result()
        speed = found["concurrency"]["1"][name]
        rows[name] = {key: speed[key] for key in ("tau", "tokens_per_s", "ratio", "ratios", "identical", "answers")}
        rows[name] |= {"head_ms": head_ms, "ms_per_level": round(head_ms / levels, 2)}
        rows[name]["coverage_counted"] = counted.get(name, 1.0)
        print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
    answers = _answers(args, prompts, common)
    for name, row in rows.items():
        ids = set(draft_vocab.read(folder / name, load_config(str(args.model)).vocab_size) or answers)
        row["coverage"] = round(sum(token in ids for token in answers) / len(answers), 4)
    return {"rows": rows, **{key: found[key] for key in ("settings", "machine", "cores", "versions")}}


def _head_ms(args: argparse.Namespace, prompts: list[list[int]], arguments: dict[str, Any]) -> float:
    """What the head takes of a step."""
    prepare_environment(args.threads)
    with engine(str(args.model), **arguments) as llm:
        watch = StepWatch(llm)
        for _ in ("warm-up", "measured"):
            steps = watch.run(prompts, 1, args.temperature, args.max_tokens)
        return summary(steps, measure_rates(args.model, args.dtype))["head_ms"]


def _answers(args: argparse.Namespace, prompts: list[list[int]], common: dict[str, Any]) -> list[int]:
    """Tokens of plain vLLM's answers."""
    from vllm import SamplingParams

    params = [SamplingParams(temperature=args.temperature, seed=i, max_tokens=args.max_tokens) for i in range(len(prompts))]
    with engine(str(args.model), **common) as llm:
        return [token for answer in generate(llm, prompts, params).token_ids for token in answer]


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| draft vocabulary | coverage | tau | head, ms a step | ms a level | tokens/s | beside plain |", "|" + "---|" * 7]
    for name, row in result["rows"].items():
        lines.append(
            f"| {name} | {100 * row['coverage']:.1f} % | {row['tau']:.2f} | {row['head_ms']:.1f} | {row['ms_per_level']:.1f} "
            f"| {row['tokens_per_s']:.1f} | {row['ratio']:.2f}x ({', '.join(f'{x:.2f}' for x in row['ratios'])}) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", required=True)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--limit", type=int, default=24, help="use the first N prompts (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    prepare_environment(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    print(table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
