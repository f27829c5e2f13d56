"""`vllm-eagle gpu-check`: every Triton kernel against its reference on fresh random inputs, then how fast it is on this GPU.

Not run on a GPU yet: it is what to run first there. Needs torch and triton; what is timed: timings.py. Where vLLM is installed,
engines are checked and timed, too: engines.py. Without a GPU, `--interpret` compares through Triton's interpreter on the CPU:
slowly, and nothing is timed.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vllm-eagle gpu-check`."""
    parser.add_argument("--seeds", type=int, default=3, help="sets of random inputs per comparison (default %(default)s)")
    parser.add_argument("--seed", type=int, help="of the first set of inputs, to see a failure again (default: drawn anew)")
    parser.add_argument("--interpret", action="store_true", help="through Triton's interpreter on the CPU; nothing is timed")
    parser.add_argument("--no-timings", action="store_true", help="compare only")
    parser.add_argument("--no-vllm", action="store_true", help="no engines, even if vLLM is installed")
    parser.add_argument("--json", type=Path, help="write the result here, too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare, time, print a table and, last, one JSON line; 1 if a kernel or an engine disagrees with its reference."""
    if args.seeds < 1:
        raise ValueError("--seeds must be at least 1")
    import torch

    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    elif not torch.cuda.is_available():
        raise ValueError("no CUDA device here; --interpret compares the kernels on the CPU, through Triton's interpreter")
    try:
        import triton
    except ImportError:
        raise ValueError("triton is not installed; on a GPU machine it comes with torch, elsewhere: pip install triton") from None
    device = torch.device("cpu" if args.interpret else "cuda")
    seed = random.randrange(1 << 31) if args.seed is None else args.seed
    print(f"--seed {seed}", file=sys.stderr, flush=True)
    result: dict[str, Any] = {
        "device": "interpreter" if args.interpret else torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]},
        "seed": seed,
        "comparisons": {},
        "failed": [],
    }
    for _ in _measure(args, device, result):  # what is known so far is not lost if the next thing fails
        if args.json is not None:
            args.json.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))
    return int(bool(result["failed"]))


def _measure(args: argparse.Namespace, device: "torch.device", result: dict[str, Any]) -> Iterator[None]:
    """Fill `result`; yields after each part."""
    import torch

    for name, error in compare(device, result["seed"], args.seeds):
        result["comparisons"][name] = error
        if error > 1:
            result["failed"].append(name)
        yield
    if args.interpret:
        return
    if not args.no_timings:
        from vllm_eagle.bench.gpu.timings import timings

        for result["timings"] in timings(device):
            yield
    if not args.no_vllm and find_spec("vllm") is not None:
        from vllm_eagle.bench.gpu import engines

        torch.cuda.empty_cache()  # the engines want it
        result["vllm"] = {}
        for name, found in engines.check():
            result["vllm"][name] = found
            yield
        result["failed"] += engines.failed(result["vllm"])
        yield


def compare(device: "torch.device", first_seed: int, seeds: int) -> Iterator[tuple[str, float]]:
    """Name and greatest error of each comparison, as a multiple of its tolerance."""
    from vllm_eagle.ops.cases import all_cases

    for case in all_cases():
        try:
            error = max(case.error(device, first_seed + i) for i in range(seeds))
        except Exception as problem:  # of a compiler or a driver: the other kernels want to be checked, too
            print(f"{case.name}: {problem!r}", file=sys.stderr)
            error = float("inf")
        print(f"{'ok  ' if error <= 1 else 'FAIL'} {error:6.3f}  {case.name}", file=sys.stderr, flush=True)
        yield case.name, round(error, 3)
