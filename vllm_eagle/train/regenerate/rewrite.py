"""Write the answers of dialogues, chunk by chunk: all first answers of a chunk together, then all second ones, and so on.

Where the user turns come from: file_turns.py, own_turns.py.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vllm_eagle.train.data.report import CUT_ANSWER, DataReport
from vllm_eagle.train.data.rows import Message, Row, RowError
from vllm_eagle.train.data.template import ChatTemplate, check_ids
from vllm_eagle.train.regenerate.filters import EMPTY
from vllm_eagle.train.regenerate.journal import Journal

CHUNK = 256  # rows that are generated together, and lost together when a run is killed

Answer = tuple[str, str]  # text, finish reason
Key = tuple[int, int]  # which of the data files, from 0; line


class Generate(Protocol):
    """What writes texts."""

    def __call__(
        self,
        prompts: list[list[int]],  # token ids
        temperatures: list[float],
        user_stops: tuple[str, ...] | None = None,  # for user turns: texts at which they end; special tokens stay in them
    ) -> list[Answer]:
        """One text per prompt."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What to regenerate, and how."""

    target: str
    data: tuple[Path, ...]  # empty where the target writes the user turns, too
    out: Path
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    max_tokens: int = 256  # per answer
    max_model_len: int = 1024  # a prompt must leave room for max_tokens
    limit: int | None = None  # use the first rows only
    own: int | None = None  # so many dialogues that the target writes itself
    turns: int = 2  # most user turns of those
    seed: int = 0
    dtype: str = "auto"
    chunk: int = CHUNK
    chat_template_kwargs: dict[str, Any] | None = None

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
        if bool(self.data) == (self.own is not None):
            raise ValueError("give either --data FILE, or --self N for dialogues that the target writes itself")
        if self.own is not None and self.own < 1:
            raise ValueError(f"--self is {self.own}; it must be at least 1, the number of dialogues")
        if self.own is not None and self.limit is not None:
            raise ValueError("--limit is for --data; with --self N the target writes N dialogues; remove it")
        if self.turns < 1:
            raise ValueError(f"--turns is {self.turns}; it must be at least 1")

    @property
    def room(self) -> int:
        """Most tokens of a prompt."""
        return self.max_model_len - self.max_tokens

    def arguments(self) -> dict[str, Any]:
        """What the answers depend on. `limit`, `own` and `max_model_len` may change between runs: they only add rows."""
        from vllm_eagle.train.data.examples import file_hash

        folder = Path(self.target)
        return {
            "target": str(folder.resolve()) if folder.is_dir() else self.target,
            **({"data_sha256": file_hash(self.data)} if self.data else {"self": True, "turns": self.turns}),
            "temperatures": list(self.temperatures),
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "dtype": self.dtype,
            "chat_template_kwargs": self.chat_template_kwargs,
        }


@dataclass(slots=True)
class Dialogue:
    """A dialogue under way."""

    key: Key
    row: Row
    temperature: float
    todo: list[Message]  # turns of the row that are not yet dealt with
    messages: list[dict[str, Any]] = field(default_factory=list)
    is_finished: bool = False

    @property
    def num_answers(self) -> int:
        """Answers so far."""
        return sum(message["role"] == "assistant" for message in self.messages)

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

    def stop(self) -> int:
        """Keep what is answered so far; returns how many user turns are dropped."""
        self.is_finished = True
        dropped = list(self.todo)
        while self.messages and self.messages[-1]["role"] != "assistant":
            dropped.append(self.messages.pop())
        return sum(message["role"] == "user" for message in dropped)

    def as_row(self, template: ChatTemplate) -> dict[str, Any]:
        """The line to write, with all that its prompts were rendered from; `data` counts the files from 0."""
        source = {"data": self.key[0], "file": self.row.path.name, "line": self.key[1]}
        return {"messages": self.messages, **template.row_keys(self.row.options), "source": source}


class Source(ABC):
    """Where dialogues come from, chunk by chunk.

    Attributes:
        total: rows to go through, for the progress; None if unknown.
        position: how many of them are dealt with.
    """

    total: int | None
    position: int

    @abstractmethod
    def next_chunk(self, num_written: int) -> list[Dialogue]:
        """Dialogues to be answered together; none at the end. `num_written`: dialogues that this run has finished."""

    def follow_up(self, dialogues: list[Dialogue]) -> None:  # noqa: B027
        """Add turns to the `todo` of dialogues that were just answered."""

    def answer_fault(self, text: str) -> str | None:
        """Why an answer is left out."""
        return None if text.strip() else EMPTY


class Regenerator:
    """Writes the answers of all dialogues of `source`, and them to `journal`."""

    def __init__(
        self,
        settings: Settings,
        template: ChatTemplate,
        generate: Generate,
        journal: Journal,
        report: DataReport,
        source: Source,
        vocab_size: int | None,
    ):
        self._settings, self._template, self._generate = settings, template, generate
        self._journal, self._report, self._source = journal, report, source
        self._vocab_size = vocab_size

    def run(self, progress: bool = True) -> int:
        """Work through the source; returns how many dialogues were written."""
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

        source, num_written = self._source, 0
        with tqdm(
            desc="regenerating", unit=" rows", total=source.total, initial=source.position, dynamic_ncols=True, disable=not progress
        ) as bar:
            while chunk := source.next_chunk(num_written):
                bar.update(source.position - bar.n)
                num_written += self._write(chunk)
            bar.update(source.position - bar.n)
        return num_written

    def _write(self, dialogues: list[Dialogue]) -> int:
        while active := [dialogue for dialogue in dialogues if dialogue.to_next_answer()]:
            self._answer(active)
            self._source.follow_up(active)
        finished = [dialogue.as_row(self._template) for dialogue in dialogues if dialogue.messages]
        self._journal.append(finished)
        return len(finished)

    def _answer(self, dialogues: list[Dialogue]) -> None:
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
            fault = self._source.answer_fault(text)
            if fault is not None:
                leave(dialogue, self._report, "empty answer" if fault == EMPTY else f"answer {fault}")
                continue
            dialogue.messages.append({"role": "assistant", "content": text, "finish_reason": finish_reason})
            if finish_reason == "length":
                leave(dialogue, self._report, CUT_ANSWER)

    def _prompt(self, dialogue: Dialogue) -> list[int] | None:
        try:
            ids = self._template.encode(
                self._template.rendered(dialogue.messages, dialogue.row.options, add_generation_prompt=True)
            )
            check_ids(ids, self._template.tokenizer, self._vocab_size)
            if len(ids) > self._settings.room:
                raise RowError("too long", f"prompt of {len(ids)} tokens, room for {self._settings.room}")
        except RowError as error:
            leave(dialogue, self._report, error.reason, error.detail)
            return None
        return ids


def leave(dialogue: Dialogue, report: DataReport, reason: str, detail: str = "") -> None:
    """Stop a dialogue, keep what is answered so far, and say why."""
    report.dropped_turns[reason] += dialogue.stop()
    kept = f"first {len(dialogue.messages)} turns kept" if dialogue.messages else ""
    report.add(dialogue.row.path, dialogue.row.line, reason, "; ".join(filter(None, (detail, kept))))
