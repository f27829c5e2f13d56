"""The `vllm-eagle` command. Subcommands import what they need when they run."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_PROMPTS = (
    'JSONL or JSON with "messages", "conversations", "turns" (MT-bench, Spec-Bench) or "prompt" (default: 64 built-in questions)'
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status. User errors are one line on stderr, status 2."""
    args = build_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        code = run(args)
        sys.stdout.flush()
        return code
    except ValueError as error:
        print(f"vllm-eagle: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read this, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more at exit
        return 128 + signal.SIGPIPE


def build_parser() -> argparse.ArgumentParser:
    """All subcommands and their options."""
    parser = argparse.ArgumentParser(prog="vllm-eagle", description="EAGLE draft trees for vLLM.")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="generate with a draft tree and compare with plain vLLM")
    _add_models(demo)
    demo.add_argument("--num-draft-tokens", type=int, default=16, help="nodes per tree (default %(default)s)")
    demo.add_argument("--max-tokens", type=int, default=120, help="per prompt (default %(default)s)")
    demo.add_argument("--prompts", type=int, default=4, help="how many of the built-in prompts (default %(default)s)")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser("doctor", help="versions, what is supported here, and why not")
    doctor.add_argument("--matrix", action="store_true", help="print what runs together with draft trees, and what does not")
    doctor.add_argument("--markdown", action="store_true", help="the matrix as a Markdown table")
    doctor.set_defaults(run=_doctor)

    from vllm_eagle.train.run import command as training

    train = commands.add_parser("train", help="train a head for a target: EAGLE-1/2 or EAGLE-3")
    training.add_arguments(train)
    train.set_defaults(run=training.run)

    from vllm_eagle.train.regenerate import command as regenerate

    answers = commands.add_parser("regenerate", help="let the target write the answers of training dialogues itself; resumable")
    regenerate.add_arguments(answers)
    answers.set_defaults(run=regenerate.run)

    from vllm_eagle.heads import command as heads

    heads.add_convert_arguments(commands.add_parser("convert", help="write a head as vLLM, SafeAILab or speculators load it"))
    heads.add_inspect_arguments(commands.add_parser("inspect", help="what a head is, which target it fits, what is odd about it"))

    measure = commands.add_parser("eval", help="draft accuracy, calibration and expected tau of a head, without vLLM")
    measure.add_argument("--target", dest="model", help="target model (default: the shipped one)")
    measure.add_argument("--head", help="head for it (default: the shipped one)")
    measure.add_argument("--prompts", type=Path, help=_PROMPTS)
    measure.add_argument("--limit", type=int, help="use the first N prompts")
    measure.add_argument("--num-draft-tokens", type=int, nargs="+", default=[16], metavar="N", help="sizes of trees (default 16)")
    measure.add_argument("--mode", choices=["dynamic", "static", "chain"], default="dynamic", help="(default %(default)s)")
    measure.add_argument("--temperature", type=float, default=0.0)
    measure.add_argument("--seed", type=int, default=0, help="prompt i samples with seed + i (default %(default)s)")
    measure.add_argument("--max-tokens", type=int, default=128, help="per answer (default %(default)s)")
    measure.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    measure.add_argument("--batch", type=int, default=32, help="prompts at a time (default %(default)s)")
    measure.add_argument("--out", type=Path, help="folder for eval.json and reliability.png")
    measure.set_defaults(run=_eval)

    compare = commands.add_parser("compare", help="tokens per target pass: plain vLLM, its EAGLE chain, our trees")
    _add_models(compare)
    compare.add_argument("--prompts", type=Path, help=_PROMPTS)
    compare.add_argument("--limit", type=int, help="use the first N prompts")
    compare.add_argument("--temperature", type=float, default=0.0)
    compare.add_argument("--seed", type=int, default=0, help="prompt i samples with seed + i (default %(default)s)")
    compare.add_argument("--max-tokens", type=int, default=128)
    compare.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    compare.add_argument("--only", nargs="+", metavar="VARIANT", help="run these variants only, e.g. tree16 vllm_chain3")
    compare.add_argument("--medusa", help="Medusa heads for the target, as another variant")
    compare.add_argument("--attention-backend", metavar="NAME", help="as vLLM's option (default: what it, or the trees, choose)")
    compare.add_argument("--json", type=Path, help="write the result here, too")
    compare.set_defaults(run=_compare)

    bench = commands.add_parser("bench", help="output tokens per second: plain vLLM, its own drafters, our trees, at rising load")
    bench.description = "Exits with 1 if greedy answers of our variants differ from plain vLLM's in float32."
    _add_models(bench)
    bench.add_argument("--prompts", type=Path, help=_PROMPTS)
    bench.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64], help="requests at once (default %(default)s)")
    bench.add_argument("--rounds", type=int, default=5, help="in which all variants take turns (default %(default)s)")
    bench.add_argument("--temperature", type=float, default=0.0)
    bench.add_argument("--seed", type=int, default=0)
    bench.add_argument("--max-tokens", type=int, default=96)
    bench.add_argument("--num-draft-tokens", type=int, default=16, help="most nodes per tree (default %(default)s)")
    bench.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    bench.add_argument("--only", nargs="+", metavar="VARIANT", help="these beside plain vLLM, e.g. trees vllm_chain3")
    bench.add_argument("--threads", type=int, help="OpenMP threads per engine, on a CPU (default: vLLM's choice)")
    bench.add_argument("--medusa", help="Medusa heads for the target, as another variant")
    bench.add_argument(
        "--replay",
        metavar="SHAPE",
        help="a pair of random weights instead, 8b or tiny, whose acceptance is that of a recording; T=0",
    )
    bench.add_argument("--enforce-eager", action="store_true", help="do not compile; starts sooner, runs slower")
    bench.add_argument("--http", action="store_true", help="through servers, with the load generator of `vllm bench serve`")
    bench.add_argument("--out", type=Path, help="folder for bench.json, bench.md and bench.png")
    bench.set_defaults(run=_bench)

    from vllm_eagle.bench.gpu import check
    from vllm_eagle.bench.recorded import simulate

    check.add_arguments(commands.add_parser("gpu-check", help="the GPU kernels against their references, and their times"))
    simulate.add_arguments(commands.add_parser("simulate", help="what the budget would do and win on other hardware"))
    return parser


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="target model (default: the shipped one)")
    parser.add_argument("--head", help="EAGLE head for it (default: the shipped one)")


def _pair(args: argparse.Namespace) -> tuple[str, str]:
    from vllm_eagle.pair import HEAD, TARGET

    if (args.model is None) != (args.head is None):
        raise ValueError("the target and --head belong together; give both, or neither for the shipped pair")
    return (str(TARGET), str(HEAD)) if args.model is None else (args.model, args.head)


def _demo(args: argparse.Namespace) -> int:
    from vllm_eagle.commands.demo import run

    return run(*_pair(args), args.num_draft_tokens, args.max_tokens, args.prompts)


def _doctor(args: argparse.Namespace) -> int:
    if args.matrix or args.markdown:
        from vllm_eagle.commands import matrix

        return matrix.run(args.markdown)
    from vllm_eagle.commands.doctor import run

    return run()


def _eval(args: argparse.Namespace) -> int:
    from vllm_eagle.evaluate.command import run

    return run(args, *_pair(args))


def _compare(args: argparse.Namespace) -> int:
    from vllm_eagle.bench.passes.compare import Settings, run

    args.model, args.head = _pair(args)
    return run(_fill(Settings, args), args.json)


def _bench(args: argparse.Namespace) -> int:
    from vllm_eagle.bench.speed.throughput import Settings, run

    if args.replay is not None and (args.model, args.head) != (None, None):
        raise ValueError("--replay makes its own target and head; remove --model and --head")
    args.model, args.head = _pair(args)
    args.concurrency = tuple(args.concurrency)
    return run(_fill(Settings, args), args.out)


def _fill(settings: Callable[..., T], args: argparse.Namespace) -> T:
    """Settings whose fields are named as the arguments are."""
    return settings(**{field.name: getattr(args, field.name) for field in fields(settings)})  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
