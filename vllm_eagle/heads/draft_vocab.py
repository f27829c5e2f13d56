"""The draft vocabulary of a head that uses the target's LM head: the tokens that it drafts, in a file beside its weights.

Drafting multiplies with these rows of the LM head alone (FR-Spec, arXiv 2502.14856). What is emitted does not change: the target
verifies over its whole vocabulary. Weights and config.json stay those of any EAGLE-1 head, so others can load it, too. EAGLE-3
heads have an LM head of their own and their map, `d2t`, among the weights.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from vllm_eagle import files

FILE = "draft_vocab.json"


def read(folder: Path, vocab_size: int) -> list[int] | None:
    """Token ids in rising order; None for a head without the file, which drafts the whole vocabulary.

    Raises:
        ValueError: the file holds no such list, or one for another vocabulary; the message says how to mend it.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return parse(json.loads(path.read_text()), vocab_size)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: {error}; remove the file to draft the whole vocabulary, or make it anew with `vllm-eagle draft-vocab`"
        ) from None


def parse(found: Any, vocab_size: int) -> list[int]:
    """Token ids of what a file holds.

    Raises:
        ValueError: no such list, or one for another vocabulary.
    """
    if not isinstance(found, dict) or not found.keys() >= {"vocab_size", "token_ids"}:
        raise ValueError('it should hold {"vocab_size": ..., "token_ids": [...]}')
    size, ids = found["vocab_size"], found["token_ids"]
    if size != vocab_size:
        raise ValueError(f"it is for a vocabulary of {size}, the target's has {vocab_size} tokens")
    if not isinstance(ids, list) or not ids or not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise ValueError(f"its token_ids should be numbers from 0 to {vocab_size - 1}, at least one")
    if any(a >= b for a, b in pairwise(ids)):
        raise ValueError("its token_ids should rise, each once")
    return ids


def write(folder: Path, token_ids: Sequence[int], vocab_size: int) -> None:
    """Put the file beside the head's weights; `token_ids` rise."""
    files.write_text(folder / FILE, json.dumps({"vocab_size": vocab_size, "token_ids": list(token_ids)}) + "\n")
