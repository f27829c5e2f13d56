"""Training text: JSONL rows with `messages` or `text`, packed into windows of equal length."""

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a .jsonl or .jsonl.gz file.

    Raises:
        ValueError: a line is no JSON object with `messages`, `prompt` or `text`; the message names file and line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: no JSON ({error})") from None
            if not isinstance(row, dict) or not {"messages", "prompt", "text"} & row.keys():
                raise ValueError(f'{path}, line {number}: a row needs "messages", "prompt" or "text"')
            yield row


class PackedWindows:
    """Endless windows [window] int64 of documents laid end to end, reshuffled every epoch."""

    def __init__(self, docs: list[list[int]], window: int, seed: int):
        if not docs:
            raise ValueError("no training documents")
        self._docs, self._window, self._random = docs, window, random.Random(seed)
        self._order: list[int] = []
        self._buffer: list[int] = []
        self.num_epochs = 0.0

    def batch(self, num_windows: int) -> torch.Tensor:
        """[num_windows, window] int64."""
        while len(self._buffer) < num_windows * self._window:
            if not self._order:
                self._order = self._random.sample(range(len(self._docs)), len(self._docs))
            self._buffer += self._docs[self._order.pop()]
            self.num_epochs += 1 / len(self._docs)
        size = num_windows * self._window
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return torch.tensor(taken).view(num_windows, self._window)


def encode_rows(tokenizer: Any, paths: list[Path]) -> list[list[int]]:
    """Token ids of every row: chats through the chat template, texts between the tokenizer's bos and eos."""
    texts = []
    for path in paths:
        for row in read_rows(path):
            if "messages" in row:
                texts.append(tokenizer.apply_chat_template(row["messages"], tokenize=False))
            else:
                texts.append(f"{tokenizer.bos_token or ''}{row['text']}{tokenizer.eos_token or ''}")
    return tokenizer(texts, add_special_tokens=False)["input_ids"]
