"""`vllm-eagle draft-vocab`: choose the tokens that an EAGLE-1 head drafts, without training it.

    vllm-eagle draft-vocab HEAD --target MODEL --data FILE [FILE ...] --size N

Counts the tokens of the answers in FILE, which the target should have written itself (`vllm-eagle regenerate`), and puts the N most
frequent into HEAD/draft_vocab.json, in place of what was there. To draft any token again, remove that file or set the option
draft_vocab to false.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vllm_eagle.heads import draft_vocab
from vllm_eagle.heads.formats import read_head
from vllm_eagle.train.data.examples import load_examples
from vllm_eagle.train.data.report import DataReport
from vllm_eagle.train.data.template import add_template_argument, parse_arguments
from vllm_eagle.train.features.target import end_tokens, load_config, load_tokenizer
from vllm_eagle.train.head.vocabulary import count_tokens, coverage, draft_vocabulary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("head", type=Path, metavar="HEAD", help="folder of an EAGLE-1 head; only draft_vocab.json is written")
    parser.add_argument("--target", required=True, help="folder of the target model")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="dialogues that the target has written")
    parser.add_argument("--size", type=int, required=True, help="how many tokens; those that end an answer are always among them")
    add_template_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the file; prints what share of the answers its tokens make up."""
    share = choose(args.head, args.target, args.data, args.size, parse_arguments(args.chat_template_kwargs))
    print(f"{args.head / draft_vocab.FILE}: {args.size} tokens, {share:.2%} of the answers")
    return 0


def choose(head: Path, target: str, data: list[Path], size: int, arguments: dict[str, Any] | None = None) -> float:
    """Write the file; returns the share of the answers' tokens that it covers. What data is left out is said on stderr.

    Raises:
        ValueError: head, target or data cannot be read, the head has an LM head of its own, or the size cannot be.
    """
    kind, config = read_head(head).kind, load_config(target)
    if kind != "EAGLE-1":
        raise ValueError(f"{head}: an {kind} head has its draft vocabulary among its weights; train it with another --draft-vocab")
    if not 1 <= size <= config.vocab_size:
        raise ValueError(f"--size is {size}; {target} has {config.vocab_size} tokens, so give a number from 1 to that")
    tokenizer, report = load_tokenizer(target), DataReport()
    examples = load_examples(
        tokenizer, data, config.max_position_embeddings, report, arguments=arguments, vocab_size=config.vocab_size
    )
    print("".join(f"{line}\n" for line in report.complaints()), end="", file=sys.stderr)
    counts = count_tokens(((example.token_ids, example.loss_mask) for example in examples), config.vocab_size)
    _, chosen = draft_vocabulary(counts, size, (end_tokens(config) | {tokenizer.eos_token_id}) - {None})
    draft_vocab.write(head, chosen.nonzero()[:, 0].tolist(), config.vocab_size)
    return coverage(counts, chosen)
