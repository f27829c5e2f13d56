"""Command-line arguments of `convert` and `inspect`; what they need is imported when they run."""

import argparse
from pathlib import Path


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vllm-eagle convert`."""
    parser.add_argument("source", type=Path, metavar="IN", help="folder of the head")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder to write; nothing is overwritten")
    parser.add_argument("--to", default="vllm", choices=["vllm", "safeailab", "speculators"], help="format (default %(default)s)")
    parser.add_argument("--target", type=Path, help="folder of the target model: the head is checked against it")
    parser.add_argument(
        "--aux-layers",
        type=int,
        nargs="+",
        metavar="LAYER",
        help="EAGLE-3: target layers that the head reads, 0 the embedding, k the output of the k-th layer, e.g. 2 16 29",
    )
    parser.set_defaults(run=_convert)


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vllm-eagle inspect`."""
    parser.add_argument("head", type=Path, metavar="HEAD", help="folder of the head")
    parser.add_argument("--target", type=Path, help="folder of a target model: does the head fit it?")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_inspect)


def _convert(args: argparse.Namespace) -> int:
    from vllm_eagle.heads.convert import convert

    notes = convert(args.source, args.out, args.to, args.target, args.aux_layers)
    print(f"wrote {args.out}")
    for note in notes:
        print(f"note: {note}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from vllm_eagle.heads.inspect import run

    return run(args.head, args.target, args.json)
