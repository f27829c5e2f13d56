"""The `vllm-eagle` command: dispatches to its subcommands, which import what they need when they run."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

# Read when torch is imported, as it is below: else vLLM's C++ warns in each run that it binds memory to where its threads run.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from vllm_eagle.bench.gpu import check
from vllm_eagle.bench.recorded import simulate
from vllm_eagle.commands import arguments
from vllm_eagle.heads import command as heads
from vllm_eagle.train.regenerate import command as regenerate
from vllm_eagle.train.run import command as training
from vllm_eagle.train.run import draft_vocab

# Name, what it does, and who adds its arguments and says what runs it.
COMMANDS = (
    ("demo", "generate with a draft tree and compare with plain vLLM", arguments.add_demo_arguments),
    ("doctor", "versions, what is supported here, and why not", arguments.add_doctor_arguments),
    ("real-target", "the folder of the real target, a chat model; fetched on first use", arguments.add_real_target_arguments),
    ("train", "train a head for a target, EAGLE-1/2 or EAGLE-3, if need be from the target alone", training.add_arguments),
    (
        "regenerate",
        "let the target write training dialogues, or their answers, itself; resumable",
        regenerate.add_arguments,
    ),
    ("draft-vocab", "choose the tokens that a head drafts, without training it", draft_vocab.add_arguments),
    ("convert", "write a head as vLLM, SafeAILab or speculators load it", heads.add_convert_arguments),
    ("inspect", "what a head is, which target it fits, what is odd about it", heads.add_inspect_arguments),
    ("eval", "draft accuracy, calibration and expected tau of a head, without vLLM", arguments.add_eval_arguments),
    ("compare", "tokens per target pass: plain vLLM, its EAGLE chain, our trees", arguments.add_compare_arguments),
    ("bench", "output tokens per second: plain vLLM, its own drafters, our trees, at rising load", arguments.add_bench_arguments),
    ("gpu-check", "the GPU kernels against their references, and their times", check.add_arguments),
    ("simulate", "what the budget would do and win on other hardware", simulate.add_arguments),
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
    for name, what, add_arguments in COMMANDS:
        add_arguments(commands.add_parser(name, help=what))
    return parser


if __name__ == "__main__":
    sys.exit(main())
