"""`vllm-eagle gpu-check`: every Triton kernel against its reference on fresh random inputs, then engines, then how fast all is.

Not run on a GPU yet: it is what to run first there. Needs torch and triton; what is timed: timings.py. Where vLLM is installed,
engines are checked and timed, too: engines.py. Without a GPU, `--interpret` compares through Triton's interpreter on the CPU:
slowly, and nothing is timed. Machines with a GPU are often lent by the minute: stages.py.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_eagle.bench.gpu import engines
from vllm_eagle.bench.gpu.stages import Clock, Result, Stage
from vllm_eagle.bench.gpu.stages import run as run_stages

if TYPE_CHECKING:
    import torch

# Seconds without which a stage is not begun. Not measured on a GPU: guesses.
_LEAST_S = {"kernels": 30, "exact": 60, "speed": 75, "timings": 20}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vllm-eagle gpu-check`."""
    parser.add_argument("--seeds", type=int, default=3, help="sets of random inputs per comparison (default %(default)s)")
    parser.add_argument("--seed", type=int, help="of the first set of inputs, to see a failure again (default: drawn anew)")
    parser.add_argument("--interpret", action="store_true", help="through Triton's interpreter on the CPU; nothing is timed")
    parser.add_argument("--no-timings", action="store_true", help="compare only")
    parser.add_argument("--no-vllm", action="store_true", help="no engines, even if vLLM is installed")
    parser.add_argument("--minutes", type=float, help="begin no part for which less is left; the result names what did not fit")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts, as the result names them")
    parser.add_argument("--json", type=Path, help="write the result here, too, after whatever is new")
    parser.add_argument("--resume", type=Path, metavar="JSON", help="go on from that result: parts that are done are not run again")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare, time, print a table and, last, one JSON line; 1 if a kernel or an engine disagrees with its reference."""
    clock = Clock(args.minutes)
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
    name = "interpreter" if args.interpret else torch.cuda.get_device_name()
    result: Result = {"comparisons": {}, "failed": []} if args.resume is None else _resumed(args.resume, name)
    seed = random.randrange(1 << 31) if args.seed is None else args.seed
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    result |= {"device": name, "versions": versions, "seed": result.get("seed", seed)}
    print(f"--seed {result['seed']}", file=sys.stderr, flush=True)

    def save() -> None:
        result["failed"] = _failed(result)
        if args.json is not None:
            args.json.write_text(json.dumps(result) + "\n")

    for _ in run_stages(_stages(args, device), result, clock):  # what is known so far is not lost if the next thing fails
        save()
    save()
    for part, why in result["left_out"].items():
        print(f"left out: {part}: {why}", file=sys.stderr)
    print(json.dumps(result))
    return int(bool(result["failed"]))


def _resumed(path: Path, device: str) -> Result:
    """Raises ValueError where it is no result of this command on such a device."""
    try:
        found: Result = json.loads(path.read_text())
        known = found["device"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"--resume {path}: is no result of this command ({error!r}); leave it out to begin anew") from None
    if known != device:
        raise ValueError(f"--resume {path}: is of {known}, this is {device}; leave it out to begin anew")
    return found | {"left_out": {}}


def _failed(result: Result) -> list[str]:
    kernels = [name for name, error in result["comparisons"].items() if error > 1]
    return kernels + [name for name, each in result.get("vllm", {}).items() if each["problem"] is not None]


def _stages(args: argparse.Namespace, device: "torch.device") -> Iterator[Stage]:
    """Kernels, answers of engines, their speed, other answers, times of kernels."""
    found = [Stage("kernels", _LEAST_S["kernels"], partial(_compare, device, args.seeds))]
    if not args.interpret:
        if not args.no_vllm and find_spec("vllm") is not None:
            for kind, commands in (("exact", engines.EXACT), ("speed", engines.SPEED), ("exact", engines.EXACT_BESIDES)):
                for name, command in commands.items():
                    if "CUSTOM" not in command or find_spec("xformers") is not None:
                        found.append(Stage(name, _LEAST_S[kind], partial(_engine, name, command)))
        if not args.no_timings:
            found.append(Stage("timings", _LEAST_S["timings"], partial(_timings, device)))
    unknown = set(args.only or []) - {stage.name for stage in found}
    if unknown:
        names = ", ".join(stage.name for stage in found)
        raise ValueError(f"--only: unknown here: {', '.join(sorted(unknown))}; known: {names}")
    yield from (stage for stage in found if not args.only or stage.name in args.only)


def _compare(device: "torch.device", seeds: int, result: Result, seconds: float) -> Iterator[str | None]:
    end_s = time.monotonic() + seconds
    for name, error in compare(device, result["seed"], seeds, skip=result["comparisons"]):
        result["comparisons"][name] = error
        yield None
        if time.monotonic() > end_s:
            yield "time was over"
            return


def _engine(name: str, command: Sequence[str], result: Result, seconds: float) -> Iterator[str | None]:
    import torch

    torch.cuda.empty_cache()  # the engine wants it
    found = engines.check(name, command, seconds)
    result.setdefault("vllm", {})[name] = found
    result["ratios"] = engines.ratios(result["vllm"])
    missing = (found["result"] or {}).get("left_out")
    yield found["problem"] or (f"without {'; '.join(missing)}" if missing else None)


def _timings(device: "torch.device", result: Result, seconds: float) -> Iterator[str | None]:
    import torch

    from vllm_eagle.bench.gpu.timings import timings

    end_s = time.monotonic() + seconds
    torch.cuda.empty_cache()
    for result["timings"] in timings(device):
        yield None
        if time.monotonic() > end_s:
            yield "time was over"
            return


def compare(device: "torch.device", first_seed: int, seeds: int, skip: Collection[str] = ()) -> Iterator[tuple[str, float]]:
    """Name and greatest error of each comparison, as a multiple of its tolerance; those to `skip` are known."""
    from vllm_eagle.ops.cases import all_cases

    for case in all_cases():
        if case.name in skip:
            continue
        try:
            error = max(case.error(device, first_seed + i) for i in range(seeds))
        except Exception as problem:  # of a compiler or a driver: the other kernels want to be checked, too
            print(f"{case.name}: {problem!r}", file=sys.stderr)
            error = float("inf")
        print(f"{'ok  ' if error <= 1 else 'FAIL'} {error:6.3f}  {case.name}", file=sys.stderr, flush=True)
        yield case.name, round(error, 3)
