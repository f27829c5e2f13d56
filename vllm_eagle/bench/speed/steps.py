"""Where the time of a decoding step goes, on a CPU: `python -m vllm_eagle.bench.speed.steps --model MODEL --head HEAD`.

Steps of plain vLLM, then of our trees with the budget, at so many requests at once: seconds in the target's forward pass and LM
head, in the head's, and in the rest, which is scheduling, preparing inputs, sampling, the walk, compaction, growing trees and
handing out tokens. Steps that hold prompts, or fewer requests, are left out. Beside them stands the least time that the target's
products could take: the larger of reading its weights once and of multiplying, at the rates that torch reaches on this machine.
The two engines do not take turns, so shares of a step are to be compared here and not speeds (`vllm-eagle bench` is for those).
Last: a line of JSON.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from vllm_eagle.bench.engines.drafters import ours
from vllm_eagle.bench.engines.offline import encode_prompts, engine, prepare_environment, timed_arguments

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(frozen=True, slots=True)
class Rates:
    """What the machine reaches, and what a pass of the target asks of it."""

    bytes_per_s: float
    operations_per_s: float
    num_weights: int
    weight_bytes: int

    def least_s(self, num_tokens: int) -> float:
        """Seconds below which no pass of so many tokens can stay, if weights are read once and nothing else takes time."""
        return max(self.weight_bytes / self.bytes_per_s, 2 * self.num_weights * num_tokens / self.operations_per_s)


@dataclass(frozen=True, slots=True)
class Step:
    """A decoding step."""

    seconds: float
    target_s: float
    head_s: float
    num_tokens: int  # in the target's pass, drafts included
    num_emitted: int


class StepWatch:
    """Times the steps of an engine in this process and, in them, its models, by hooks of torch that stay where they are."""

    def __init__(self, llm: "LLM"):
        self._engine = llm.llm_engine
        self._seconds = {"target": 0.0, "head": 0.0}  # of this step
        self._num_tokens = 0
        llm.collective_rpc(self._watch)

    def _watch(self, worker: Any) -> None:
        runner = worker.model_runner
        target = runner.get_model()
        self._time("target", target, target.logits_processor, self._count)
        if (drafter := getattr(runner, "drafter", None)) is not None:
            self._time("head", drafter.model, drafter.logits)

    def _time(self, part: str, model: Any, logits: Any, saw: Callable[[Any], None] | None = None) -> None:
        """A model's forward pass, whose output `saw` is given, and its logits, which are asked for apart from it."""
        began_s = 0.0

        def begin(*_: Any) -> None:
            nonlocal began_s
            began_s = time.perf_counter()

        def end(module: Any, _: Any, output: Any) -> None:
            self._seconds[part] += time.perf_counter() - began_s
            if saw is not None and module is model:
                saw(output)

        for module in (model, logits):
            module.register_forward_pre_hook(begin)
            module.register_forward_hook(end)

    def _count(self, output: Any) -> None:
        self._num_tokens = len(output[0] if isinstance(output, tuple) else output)  # EAGLE-3 reads more than the last layer

    def run(self, prompts: Sequence[list[int]], at_once: int, temperature: float, max_tokens: int) -> list[Step]:
        """Steps in which so many answers were under way and none began, while about twice as many are given."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA
        waiting = [
            SamplingParams(temperature=temperature, seed=i, max_tokens=max_tokens, output_kind=kind) for i in range(2 * at_once + 1)
        ]
        steps = []
        begun: set[str] = set()
        while waiting or self._engine.has_unfinished_requests():
            while waiting and self._engine.get_num_unfinished_requests() < at_once:
                params = waiting.pop()
                self._engine.add_request(str(params.seed), {"prompt_token_ids": prompts[params.seed % len(prompts)]}, params)
            self._seconds = dict.fromkeys(self._seconds, 0.0)
            start = time.perf_counter()
            outputs = self._engine.step()
            seconds = time.perf_counter() - start
            answers = {output.request_id for output in outputs}
            if len(answers) == at_once and answers <= begun:
                emitted = sum(len(output.outputs[0].token_ids) for output in outputs)
                steps.append(Step(seconds, self._seconds["target"], self._seconds["head"], self._num_tokens, emitted))
            begun |= answers
        return steps


def summary(steps: Sequence[Step], rates: Rates) -> dict[str, float]:
    """Means, in milliseconds where it says so.

    Raises:
        ValueError: there is no step.
    """
    if not steps:
        raise ValueError("no step held all requests and no prompt; give more --max-tokens")
    total, target, head = (1000 * fmean(values) for values in zip(*((s.seconds, s.target_s, s.head_s) for s in steps), strict=True))
    return {
        "steps": len(steps),
        "tokens_in_pass": round(fmean(step.num_tokens for step in steps), 1),
        "tokens_emitted": round(fmean(step.num_emitted for step in steps), 2),
        "step_ms": round(total, 2),
        "target_ms": round(target, 2),
        "target_least_ms": round(1000 * fmean(rates.least_s(step.num_tokens) for step in steps), 2),
        "head_ms": round(head, 2),
        "rest_ms": round(total - target - head, 2),
        "rest_share": round(1 - (target + head) / total, 4),
    }


def measure_rates(model: Path, dtype: str) -> Rates:
    """Best of five: a sum over 256 MiB, and products of 2048 x 2048 matrices."""
    import torch

    from vllm_eagle.heads.checkpoint import read_tensors

    kind = getattr(torch, dtype)
    sizes = {name: tensor.numel() for name, tensor in read_tensors(model).items()}
    # Of the input embedding a pass reads some rows, unless it is the LM head as well.
    tied = "lm_head.weight" not in sizes
    weights = sum(size for name, size in sizes.items() if tied or not name.endswith("embed_tokens.weight"))
    memory, square = torch.ones(64 << 20), torch.ones(2048, 2048, dtype=kind)
    return Rates(
        bytes_per_s=memory.nbytes / _fastest(memory.sum),
        operations_per_s=2 * 2048**3 / _fastest(lambda: square @ square),
        num_weights=weights,
        weight_bytes=weights * kind.itemsize,
    )


def _fastest(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def table(result: dict[str, Any]) -> str:
    """Markdown, a row per side and number of requests."""
    lines = [
        "| requests | | step, ms | target (least possible) | head | rest | tokens in a pass | emitted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number in next(iter(result["steps"].values())):
        for side, by_number in result["steps"].items():
            found = by_number[number]
            lines.append(
                f"| {number} | {side} | {found['step_ms']:.1f} | {found['target_ms']:.1f} ({found['target_least_ms']:.1f}) "
                f"| {found['head_ms']:.1f} | {found['rest_ms']:.1f} ({100 * found['rest_share']:.0f} %) "
                f"| {found['tokens_in_pass']:.1f} | {found['tokens_emitted']:.1f} |"
            )
    return "\n".join(lines)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """What the JSON holds."""
    import torch
    import vllm

    from vllm_eagle.bench.speed.throughput import cpu

    if torch.cuda.is_available():
        raise ValueError("times of a step are taken on the host, which does not wait for a GPU; hide it: CUDA_VISIBLE_DEVICES=''")
    prompts = encode_prompts(str(args.model), None)
    rates = measure_rates(args.model, args.dtype)
    # Prompts come whole, so that a step holds some or none.
    common = timed_arguments(prompts, args.max_tokens, max(args.concurrency), args.dtype, args.enforce_eager)
    steps: dict[str, dict[str, Any]] = {}
    for side, options in {"plain": {}, "trees": ours(args.head, args.num_draft_tokens)}.items():
        with engine(str(args.model), kv_cache_memory_bytes=1 << 30, **common, **options) as llm:
            watch = StepWatch(llm)
            steps[side] = {}
            for number in args.concurrency:
                for _ in ("warm-up, in which the budget learns", "measured"):
                    found = watch.run(prompts, number, args.temperature, args.max_tokens)
                steps[side][str(number)] = summary(found, rates)
                print(f"{side}, {number} at once: {steps[side][str(number)]}", file=sys.stderr, flush=True)
    names = ("dtype", "threads", "temperature", "max_tokens", "num_draft_tokens", "enforce_eager")
    return {
        "steps": steps,
        "read_gb_per_s": round(rates.bytes_per_s / 1e9, 1),
        "gflop_per_s": round(rates.operations_per_s / 1e9, 1),
        "weights": rates.num_weights,
        "settings": {name: getattr(args, name) for name in names} | {"model": args.model.name, "head": Path(args.head).name},
        "machine": cpu(),
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
    }


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--head", required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--num-draft-tokens", type=int, help="most nodes per tree (default: as in serving)")
    parser.add_argument("--enforce-eager", action="store_true")
    args = parser.parse_args(argv)
    if min(args.concurrency) < 1 or args.max_tokens < 2 or args.threads < 1:
        parser.error("--concurrency and --threads must be at least 1 and --max-tokens at least 2")
    return args


def main(argv: list[str] | None = None) -> None:
    """Print a table and JSON."""
    args = _parse(argv)
    prepare_environment(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    result = measure(args)
    print(table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
