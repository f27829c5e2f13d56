"""Replace the answers of dialogues, chunk by chunk: all first answers of a chunk together, then all second ones, and so on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_eagle.train.data.report import DataReport
from vllm_eagle.train.data.rows import Message, Row, iter_rows
from vllm_eagle.train.regenerate.journal import Journal

CHUNK = 256  # rows that are generated together, and lost together when a run is killed

Answer = tuple[str, str]  # text, finish reason
Generate = Callable[[list[list[int]], list[float]], list[Answer]]  # prompts' token ids, their temperatures
Key = tuple[int, int]  # which of the data files, from 0; line


@dataclass(frozen=True, slots=True)
class Settings:
    """What to regenerate, and how."""

    target: str
    data: tuple[Path, ...]
    out: Path
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    max_tokens: int = 256  # per answer
    max_model_len: int = 1024  # a prompt must leave room for max_tokens
    limit: int | None = None  # use the first rows only
    seed: int = 0
    dtype: str = "auto"
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.max_tokens >= self.max_model_len:
            raise ValueError(
                f"--max-tokens is {self.max_tokens}; it must be at least 1 and leave room for a question "
                f"within --max-model-len, which is {self.max_model_len}"
            )
        if min(self.temperatures) < 0:
            raise ValueError(f"--temperature is {min(self.temperatures)}; it must not be negative")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit is {self.limit}; it must be at least 1")

    def arguments(self) -> dict[str, Any]:
        """What the answers depend on. `limit` and `max_model_len` may change between runs: they only add rows."""
        from vllm_eagle.train.data.examples import file_hash

        folder = Path(self.target)
        return {
            "target": str(folder.resolve()) if folder.is_dir() else self.target,
            "data_sha256": file_hash(self.data),
            "temperatures": list(self.temperatures),
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "dtype": self.dtype,
        }


@dataclass(slots=True)
class _Dialogue:
    """A dialogue under way."""

    key: Key
    row: Row
    temperature: float
    todo: list[Message]  # turns of the row that are not yet dealt with
    messages: list[dict[str, Any]] = field(default_factory=list)
    is_finished: bool = False

    def to_next_answer(self) -> bool:
        """Take the turns before the next answer; False if there is no answer to write."""
        if self.is_finished:
            return False
        while self.todo and self.todo[0]["role"] != "assistant":
            self.messages.append(self.todo.pop(0))
        if self.todo:
            self.todo.pop(0)
        self.is_finished = self.messages[-1]["role"] != "user"
        return not self.is_finished

    def stop(self) -> None:
        """Keep what is answered so far."""
        self.is_finished = True
        while self.messages and self.messages[-1]["role"] != "assistant":
            self.messages.pop()

    def as_row(self) -> dict[str, Any]:
        """The line to write; `data` counts the files from 0."""
        return {"messages": self.messages, "source": {"data": self.key[0], "file": self.row.path.name, "line": self.key[1]}}


class Regenerator:
    """Writes the answers of all dialogues that `journal` does not hold yet."""

    def __init__(self, settings: Settings, tokenizer: Any, generate: Generate, journal: Journal, report: DataReport):
        self._settings, self._tokenizer, self._generate = settings, tokenizer, generate
        self._journal, self._report = journal, report

    def run(self, done: set[Key], progress: bool = True) -> int:
        """Work through the data, leaving out the rows of `done`; returns how many dialogues were written."""
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

        with tqdm(desc="regenerating", unit=" rows", total=self._settings.limit, disable=not progress) as bar:
            return self._run(done, bar)

    def _run(self, done: set[Key], bar: Any) -> int:
        num_written = 0
        waiting: list[_Dialogue] = []
        for number, (key, row) in enumerate(self._rows()):
            if number == self._settings.limit:
                break
            bar.update()
            if key in done:
                continue
            temperature = self._settings.temperatures[number % len(self._settings.temperatures)]
            waiting.append(_Dialogue(key, row, temperature, list(row.messages or [])))
            if len(waiting) == self._settings.chunk:
                num_written += self._write(waiting)
                waiting = []
        return num_written + (self._write(waiting) if waiting else 0)

    def _rows(self) -> Iterator[tuple[Key, Row]]:
        for data, path in enumerate(self._settings.data):
            for row in iter_rows(path, self._report):
                if row.messages is None:
                    self._report.add(path, row.line, "plain text", "there is nothing to answer")
                elif any(message["role"] == "tool" for message in row.messages):
                    self._report.add(path, row.line, "tool turn", "the tool's reply belongs to the old answer")
                elif all(message["role"] == "system" for message in row.messages):
                    self._report.add(path, row.line, "no user turn")
                else:
                    yield (data, row.line), row

    def _write(self, dialogues: list[_Dialogue]) -> int:
        while active := [dialogue for dialogue in dialogues if dialogue.to_next_answer()]:
            self._answer(active)
        finished = [dialogue.as_row() for dialogue in dialogues if dialogue.messages]
        self._journal.append(finished)
        return len(finished)

    def _answer(self, dialogues: list[_Dialogue]) -> None:
        """Add one answer to each dialogue, or stop it."""
        ready, prompts = [], []
        for dialogue in dialogues:
            prompt = self._prompt(dialogue)
            if prompt is not None:
                ready.append(dialogue)
                prompts.append(prompt)
        if not ready:
            return
        answers = self._generate(prompts, [dialogue.temperature for dialogue in ready])
        for dialogue, (text, finish_reason) in zip(ready, answers, strict=True):
            if not text.strip():
                self._leave(dialogue, "empty answer")
                continue
            dialogue.messages.append({"role": "assistant", "content": text})
            if finish_reason == "length":
                dialogue.messages[-1]["finish_reason"] = "length"
                dialogue.stop()

    def _prompt(self, dialogue: _Dialogue) -> list[int] | None:
        try:
            text = self._tokenizer.apply_chat_template(dialogue.messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of the model's author and may raise anything
            self._leave(dialogue, "template error", " ".join(f"{error}".split())[:200])
            return None
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        room = self._settings.max_model_len - self._settings.max_tokens
        if len(ids) > room:
            self._leave(dialogue, "too long", f"prompt of {len(ids)} tokens, room for {room}")
            return None
        return ids

    def _leave(self, dialogue: _Dialogue, reason: str, detail: str = "") -> None:
        dialogue.stop()
        kept = f"first {len(dialogue.messages)} turns kept" if dialogue.messages else ""
        self._report.add(dialogue.row.path, dialogue.row.line, reason, "; ".join(filter(None, (detail, kept))))
