"""Why a text that a model wrote by itself is not worth learning from."""

from collections.abc import Sequence
from typing import Any

EMPTY, MARKERS, SHORT = "empty", "contains template markers", "too short"
REPEATS, CUT, DUPLICATE = "repeats itself", "cut off at max tokens", "duplicate of an earlier one"

MIN_BYTES = 12  # of a question; some three words, or four Chinese characters
RUN = 4  # tokens in a row that are looked for again
MIN_TOKENS = 12  # shorter texts are not called loops


def answer_fault(text: str, markers: Sequence[str], tokenizer: Any) -> str | None:
    """Why an answer is left out. One that was cut off is not: it says so itself, and training heeds it."""
    if not text.strip():
        return EMPTY
    if any(marker in text for marker in markers):
        return MARKERS
    return REPEATS if is_loop(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) else None


def user_fault(text: str, finish_reason: str, markers: Sequence[str], tokenizer: Any) -> str | None:
    """Why a user's turn is left out."""
    fault = answer_fault(text, markers, tokenizer)
    if fault is not None:
        return fault
    if finish_reason == "length":
        return CUT
    return SHORT if len(text.strip().encode()) < MIN_BYTES else None


def is_loop(token_ids: Sequence[int]) -> bool:
    """Whether more than half of all runs of a few tokens have come before. Prose and code stay far below."""
    runs = [tuple(token_ids[i : i + RUN]) for i in range(len(token_ids) - RUN + 1)]
    return len(token_ids) >= MIN_TOKENS and 2 * len(set(runs)) < len(runs)


def same_words(text: str) -> str:
    """What two texts share that differ in capitals and white space only."""
    return " ".join(text.casefold().split())
