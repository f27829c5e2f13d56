"""Draft trees together with what else vLLM does: quantization, compilation, adapters, tensor parallelism, chunks, EAGLE-3.

    python -m vllm_eagle.bench.passes.combine --target MODEL --eagle HEAD --eagle3 HEAD --json FILE

For each combination, one engine without speculation and one with trees live side by side and answer the same questions in turn, one
question at a time, several rounds: medians of the rounds' ratios. In half precision tokens may differ where two scores tie within
rounding; the table says by how much plain vLLM preferred its own token there.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eagle.bench.engines.drafters import ours
from vllm_eagle.bench.engines.offline import Generated, encode_prompts, engine, generate, prepare_environment
from vllm_eagle.bench.passes.gaps import gaps
from vllm_eagle.bench.passes.lora import random_adapter
from vllm_eagle.bench.passes.quantize import Scheme, quantize

if TYPE_CHECKING:
    from vllm import SamplingParams


@dataclass(frozen=True, slots=True)
class Combination:
    """What differs from the base case."""

    title: str
    engine: dict[str, Any] = field(default_factory=dict)
    scheme: Scheme | None = None
    head: str = "eagle"
    lora: float | None = None  # strength of the adapter


COMBINATIONS = {
    "base": Combination("EAGLE-1 head, bfloat16"),
    "eagle3": Combination("EAGLE-3 head", head="eagle3"),
    "w8a8": Combination("INT8 W8A8 target", scheme="W8A8"),
    "w4a16": Combination("4-bit W4A16 target", scheme="W4A16"),
    "lora": Combination("LoRA adapter on the target", {"enable_lora": True, "max_lora_rank": 8}, lora=0.05),
    "compile": Combination("torch.compile", {"enforce_eager": False}),
    "no_prefix_caching": Combination("prefix caching off", {"enable_prefix_caching": False}),
    "chunked": Combination("prompts in chunks of at most 48 tokens", {"max_num_batched_tokens": 48}),
    "tp2": Combination("tensor parallel 2", {"tensor_parallel_size": 2}),
}


def measure(
    target: Path,
    heads: dict[str, str],
    combination: Combination,
    prompts: list[list[int]],
    params: "list[SamplingParams]",
    num_draft_tokens: int,
    rounds: int,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """tau, ratio of times and differing tokens of one combination."""
    common: dict[str, Any] = {
        "dtype": dtype,
        "max_model_len": 512,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 28,
        "max_num_seqs": 1,
    } | combination.engine
    trees = ours(heads[combination.head], num_draft_tokens, budget=False)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = target if combination.scheme is None else quantize(target, folder / "quantized", combination.scheme)
        options: dict[str, Any] = {}
        if combination.lora is not None:
            from vllm.lora.request import LoRARequest

            options["lora_request"] = LoRARequest("a", 1, str(random_adapter(target, folder / "adapter", combination.lora)))
        plain = stack.enter_context(engine(str(model), **common, max_logprobs=-1))
        with_trees = stack.enter_context(engine(str(model), **common, **trees))
        generate(plain, prompts[:1], params[:1], **options)
        generate(with_trees, prompts[:1], params[:1], **options)
        pairs = []
        for i in range(rounds):
            # Turn about, so that neither always runs on the warmer machine.
            order = (plain, with_trees) if i % 2 == 0 else (with_trees, plain)
            found = {id(llm): generate(llm, prompts, params, **options) for llm in order}
            pairs.append((found[id(plain)], found[id(with_trees)]))
        expected, answers = pairs[0]
        return {
            "title": combination.title,
            "tau": round(answers.tau, 3),
            "speedup": round(statistics.median(one.seconds / other.seconds for one, other in pairs), 3),
            "speedups": [round(one.seconds / other.seconds, 3) for one, other in pairs],
            "plain_tokens_per_s": round(statistics.median(_rate(one) for one, _ in pairs), 1),
            "trees_tokens_per_s": round(statistics.median(_rate(other) for _, other in pairs), 1),
            "identical": sum(a == b for a, b in zip(expected.token_ids, answers.token_ids, strict=True)),
            "prompts": len(prompts),
            "gaps": gaps(plain, prompts, params, expected, answers, **options),
        }


def _rate(found: Generated) -> float:
    return found.tokens / found.seconds


def table(result: dict[str, Any]) -> str:
    """Markdown, one row per combination."""
    lines = [
        "| | tau | plain, tokens/s | trees, tokens/s | ratio (median; rounds) | identical | largest gap |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in result["combinations"].values():
        rounds = ", ".join(f"{ratio:.1f}" for ratio in sorted(found["speedups"]))
        gap = f"{max(found['gaps']):.3f}" if found["gaps"] else ""
        lines.append(
            f"| {found['title']} | {found['tau']:.2f} | {found['plain_tokens_per_s']:.1f} | {found['trees_tokens_per_s']:.1f} "
            f"| {found['speedup']:.2f} ({rounds}) | {found['identical']} of {found['prompts']} | {gap} |"
        )
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--eagle", required=True)
    parser.add_argument("--eagle3", required=True)
    parser.add_argument("--only", nargs="+", choices=list(COMBINATIONS), default=list(COMBINATIONS))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-draft-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2, help="of each engine, all its ranks together")
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Command line."""
    args = _parse()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # two engines side by side
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # ... on the same cores, in turn
    prepare_environment()
    import torch
    import vllm
    from vllm import SamplingParams

    prompts = encode_prompts(str(args.target), None, args.prompts)
    params = [SamplingParams(temperature=0, max_tokens=args.max_tokens) for _ in prompts]
    result: dict[str, Any] = {
        "combinations": {},
        "settings": {
            name: getattr(args, name) for name in ("dtype", "prompts", "max_tokens", "rounds", "num_draft_tokens", "threads")
        }
        | {"target": args.target.name, "eagle": Path(args.eagle).name, "eagle3": Path(args.eagle3).name},
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    heads = {"eagle": args.eagle, "eagle3": args.eagle3}
    for name in args.only:
        ranks = COMBINATIONS[name].engine.get("tensor_parallel_size", 1)
        os.environ["OMP_NUM_THREADS"] = str(max(1, args.threads // ranks))  # for the engines' processes
        result["combinations"][name] = measure(
            args.target, heads, COMBINATIONS[name], prompts, params, args.num_draft_tokens, args.rounds, args.dtype
        )
        print(json.dumps({name: result["combinations"][name]}), flush=True)
        args.json.write_text(json.dumps(result) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
