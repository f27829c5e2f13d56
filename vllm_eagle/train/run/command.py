"""`vllm-eagle train`: options -> TrainSettings. Without --data the target writes the data first: whole.py."""

import argparse
import os
import shlex
import sys
from dataclasses import MISSING, fields, replace
from pathlib import Path

from vllm_eagle.train.data.template import add_template_argument, parse_arguments
from vllm_eagle.train.run import own_data, resume, stop
from vllm_eagle.train.run.own_data import DEFAULT_NUMBER
from vllm_eagle.train.run.settings import DEFAULT_WEIGHTS, TrainSettings

_DEFAULTS = {field.name: field.default for field in fields(TrainSettings) if field.default is not MISSING}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--target", required=True, help="folder of the target model")
    parser.add_argument("--data", type=Path, nargs="+", help="dialogues (.jsonl, .json, .gz) or text (.txt)")
    parser.add_argument(
        "--self",
        type=int,
        metavar="N",
        dest="own",
        help=f"without --data: N dialogues that the target writes itself, into OUT/self (default {DEFAULT_NUMBER})",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for head, checkpoints, curves and run card")
    parser.add_argument("--method", choices=["eagle", "eagle3", "medusa"], default="eagle", help="medusa: for comparison only")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--init", type=Path, help="head to start from")
    add_template_argument(parser)

    length = parser.add_argument_group("length of the run")
    _add(length, "--epochs", float, "passes over the data")
    _add(length, "--steps", int, "optimizer steps, instead of epochs")
    _add(length, "--batch-tokens", int, "most tokens per forward pass and process")
    _add(length, "--accumulate", int, "forward passes per optimizer step")
    _add(length, "--max-length", int, "tokens after which a dialogue is cut, at most the target's positions")
    _add(length, "--holdout", float, "share of the dialogues kept for validation")

    head = parser.add_argument_group("head and loss")
    _add(head, "--lr", float, "highest learning rate")
    _add(head, "--warmup", int, "steps until it is reached")
    _add(head, "--grad-clip", float, "norm to which gradients are clipped")
    _add(head, "--draft-vocab", int, "size of the draft vocabulary (default: the target's, eagle3 32000)")
    _add(head, "--head-layers", int, "decoder layers of the head; the authors have one")
    head.add_argument("--aux-layers", type=int, nargs=3, metavar="LAYER", help="eagle3: target layers (default 2, n/2, n-3)")
    head.add_argument("--unroll-steps", type=int, help="first pass and passes on own outputs (default: 1, eagle3 7, medusa 5)")
    head.add_argument("--step-decay", type=float, help="weight of a step relative to the one before (default 0.8)")
    head.add_argument("--noise", type=float, help="half width of the noise on features (default: 0.1, eagle3 0)")
    head.add_argument("--regression-weight", type=float, help="weight of the feature loss (default: 1, eagle3 0)")
    head.add_argument("--classification-weight", type=float, help="weight of the token loss (default: 0.1, eagle3 1)")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    _add(machine, "--seed", int, "of initial weights, order and noise")
    machine.add_argument("--cache-dir", type=Path, help="keep the target's features here for later epochs")
    _add(machine, "--cache-gb", float, "most disk space for them")
    _add(machine, "--log-every", int, "steps")
    _add(machine, "--eval-every", int, "steps")
    _add(machine, "--checkpoint-every", int, "steps")
    machine.add_argument("--price-per-hour", type=float, help="of one device, for the run card")
    parser.set_defaults(run=run)


def _add(group: argparse._ArgumentGroup, flag: str, kind: type, text: str) -> None:
    default = _DEFAULTS[flag.removeprefix("--").replace("-", "_")]
    group.add_argument(flag, type=kind, default=default, help=text + ("" if default is None else " (default %(default)s)"))


def settings_from(args: argparse.Namespace) -> TrainSettings:
    """Settings of a parsed command line.

    Raises:
        ValueError: an option cannot be.
    """
    named = {
        "num_steps": args.unroll_steps,
        "step_decay": args.step_decay,
        "noise": args.noise,
        "regression": args.regression_weight,
        "classification": args.classification_weight,
    }
    weights = replace(DEFAULT_WEIGHTS[args.method], **{k: v for k, v in named.items() if v is not None})
    options = {name: getattr(args, name) for name in _DEFAULTS if hasattr(args, name)}
    options |= {"aux_layers": tuple(args.aux_layers) if args.aux_layers else None}
    options |= {"chat_template_kwargs": parse_arguments(args.chat_template_kwargs)}
    return TrainSettings(target=args.target, data=tuple(args.data or ()), out=args.out, weights=weights, **options)


def _stopped(stopped: stop.StoppedError, resumable: bool) -> str:
    """How to go on after a signal."""
    words = [word for word in sys.argv[1:] if word != "--resume"] + (["--resume"] if resumable else [])
    where = "" if stopped.step is None else f" after step {stopped.step}, which is saved"
    again = "go on" if resumable else "start again"
    return f"vllm-eagle: stopped by {stopped}{where}; {again} with: {shlex.join(['vllm-eagle', *words])}"


def run(args: argparse.Namespace) -> int:
    """Train; prints where the head is and how good."""
    settings = settings_from(args)
    if args.data is not None and args.own is not None:
        raise ValueError("--data and --self exclude each other; remove one: --self N lets the target write the data itself")
    number = DEFAULT_NUMBER if args.own is None else args.own
    if args.data is None:
        own_data.check_number(number)
    try:
        with stop.raised():
            print(_run(settings, number if args.data is None else None), end="")
    except stop.StoppedError as stopped:
        if int(os.environ.get("RANK", "0")) == 0:
            print(_stopped(stopped, args.data is None or resume.holds_run(settings.out)), file=sys.stderr)
        return 128 + stopped.number
    return 0


def _run(settings: TrainSettings, number: int | None) -> str:
    """Train, on `number` dialogues of the target's own if there is no data; returns what is to be said, by one process."""
    from transformers.utils import logging

    from vllm_eagle.train.run.loop import train
    from vllm_eagle.train.run.whole import train_from_nothing

    logging.disable_progress_bar()
    if number is not None:
        return train_from_nothing(settings, number) + "\n"
    card = train(settings)
    if not card:
        return ""
    held_out = card["facts"].get("held_out", {})
    alphas = ", ".join(f"{name} {value:.3f}" for name, value in held_out.items() if name.startswith("alpha"))
    return f"{settings.out}: {card['result']['tokens']:,} tokens in {card['result']['seconds']:,.0f} s. {alphas}\n"
