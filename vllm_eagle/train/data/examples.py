"""Training examples from data files: tokens, and which of them an assistant emits.

Plain texts stand between the tokenizer's bos and eos and are cut into windows, every token counts. Dialogues go through the chat
template; only the answers count, each with its end of turn. Formats and rules: rows.py; template: template.py; answers: answers.py.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vllm_eagle.train.data.answers import Dialogue, Dialogues, Encodings
from vllm_eagle.train.data.report import OVER_LONG, PARTLY, REWRITTEN, UNSHOWN, DataReport
from vllm_eagle.train.data.rows import Row, RowError, check_files, iter_rows
from vllm_eagle.train.data.template import ChatTemplate, check_ids

CHUNK = 512  # rows per call of the tokenizer
NO_ANSWER = ("no answer", "regenerate first")
MIN_LENGTH = 3  # feature and next token give a feature, whose token is the third


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence to train on."""

    token_ids: torch.Tensor  # [length] int32
    loss_mask: torch.Tensor  # [length] bool: tokens that an assistant emits, ends of turns included; all of a plain text


def load_examples(
    tokenizer: Any,
    paths: Sequence[Path],
    max_length: int,
    report: DataReport,
    progress: bool = True,
    arguments: dict[str, Any] | None = None,
    vocab_size: int | None = None,
) -> list[Example]:
    """Examples of at most `max_length` tokens, always in the same order. All rows are held in memory while they are encoded.

    Over-long dialogues are cut; texts go on in the next example, but for a rest of fewer than `MIN_LENGTH` tokens.

    Args:
        tokenizer: the target's.
        paths: of the files.
        max_length: most tokens of an example.
        report: gets what is left out or changed.
        progress: show a bar.
        arguments: of the chat template.
        vocab_size: the target's; rows with other tokens are left out.

    Raises:
        ValueError: a file is missing or of an unknown kind, a dialogue meets a tokenizer that cannot render it, or nothing
            usable is left; then the message tells what was wrong.
    """
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    if max_length < MIN_LENGTH:
        raise ValueError(f"max_length is {max_length}; training needs at least {MIN_LENGTH} tokens")
    check_files(list(paths))
    rows = [row for path in paths for row in _trainable(path, report)]
    encoder = _Encoder(tokenizer, next((row for row in rows if row.messages), None), max_length, report, arguments, vocab_size)
    examples: list[Example] = []
    with tqdm(total=len(rows), desc="tokenising", unit=" rows", disable=not progress) as bar:
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            examples += encoder.encode(chunk)
            bar.update(len(chunk))
    report.num_examples += len(examples)
    report.num_tokens += sum(len(example.token_ids) for example in examples)
    report.num_loss_tokens += int(sum(example.loss_mask.sum() for example in examples))
    if not examples:
        raise ValueError(f"no usable row in {', '.join(map(str, paths))}\n{report.summary()}")
    return examples


def file_hash(paths: Sequence[Path]) -> str:
    """SHA-256 of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _trainable(path: Path, report: DataReport) -> Iterator[Row]:
    """Rows with something to learn; turns after the last answer are dropped."""
    for row in iter_rows(path, report):
        if row.messages is None:
            yield row
            continue
        messages = list(row.messages)
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if messages:
            yield replace(row, messages=messages)
        else:
            report.add(path, row.line, *(NO_ANSWER if row.is_prompt else ("no assistant turn",)))


class _Encoder:
    """Rows to examples."""

    def __init__(
        self,
        tokenizer: Any,
        first_dialogue: Row | None,
        max_length: int,
        report: DataReport,
        arguments: dict[str, Any] | None,
        vocab_size: int | None,
    ):
        self._tokenizer, self._max_length, self._report, self._vocab_size = tokenizer, max_length, report, vocab_size
        self._bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._dialogues = None
        if first_dialogue is not None:
            _check_tokenizer(tokenizer, first_dialogue)
            template = ChatTemplate(tokenizer, tokenizer.name_or_path, arguments)
            self._dialogues = Dialogues(template, max_length)
            self._shows_tools = template.uses("tools")

    def encode(self, rows: list[Row]) -> list[Example]:
        """Examples of a chunk of rows: its texts, then its dialogues."""
        examples: list[Example] = []
        texts = [(row, row.text) for row in rows if row.text is not None]
        if texts:
            ids = self._tokenizer([text for _, text in texts], add_special_tokens=False, verbose=False)["input_ids"]
            for (row, _), found in zip(texts, ids, strict=True):
                with self._reporting(row):
                    examples += self._windows(self._bos + found + self._eos)
        dialogues = [(row, row.messages) for row in rows if row.messages is not None]
        if dialogues and self._dialogues:
            encoded = self._dialogues.encode([Dialogue(messages, row.options) for row, messages in dialogues])
            for (row, _), result in zip(dialogues, encoded, strict=True):
                with self._reporting(row):
                    examples += self._examples(row, result)
        return examples

    @contextmanager
    def _reporting(self, row: Row) -> Iterator[None]:
        try:
            yield
        except RowError as error:
            self._report.add(row.path, row.line, error.reason, error.detail)

    def _windows(self, ids: list[int]) -> list[Example]:
        check_ids(ids, self._tokenizer, self._vocab_size)
        windows = torch.tensor(ids, dtype=torch.int32).split(self._max_length)
        return [Example(window, torch.ones(len(window), dtype=torch.bool)) for window in windows if len(window) >= MIN_LENGTH]

    def _examples(self, row: Row, result: Encodings | str) -> list[Example]:
        if isinstance(result, str):
            raise RowError("template error", result)
        examples = []
        for text in result.texts:
            check_ids(text.token_ids, self._tokenizer, self._vocab_size)
            loss_mask = text.loss_mask[: self._max_length].clone()  # no view: the whole dialogue would stay in memory
            if loss_mask.any():
                examples.append(Example(torch.tensor(text.token_ids[: self._max_length], dtype=torch.int32), loss_mask))
        longest = max((len(text.token_ids) for text in result.texts), default=0)
        cut = f"{longest} tokens, at most {self._max_length}"
        if not examples:
            raise RowError("no loss token left", cut if longest > self._max_length else "the chat template marks no answer")
        num_missed = sum(text.num_missed for text in result.texts)
        for reason, holds, detail in (
            (OVER_LONG, longest > self._max_length, cut),
            (REWRITTEN, result.num_lost > 0, f"{result.num_lost} turns"),
            (PARTLY, num_missed > 0, f"{num_missed} characters in tokens that are not the answer's alone"),
            (UNSHOWN, "tools" in row.options and not self._shows_tools, ""),
        ):
            if holds:
                self._report.add(row.path, row.line, reason, detail)
        return examples


def _check_tokenizer(tokenizer: Any, row: Row) -> None:
    if not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template and {row.path}:{row.line} is a dialogue; "
            'put a chat_template.jinja into its folder, or train on rows with "text"'
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{tokenizer.name_or_path}: marking the answers of a dialogue needs a tokenizer with character offsets; "
            "put a tokenizer.json into its folder"
        )
