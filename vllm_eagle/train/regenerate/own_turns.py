"""Dialogues whose user turns the target writes itself, too (Magpie, arXiv 2406.08464), and what is left out of them."""

import math
from collections import deque
from pathlib import Path
from typing import Any

from vllm_eagle.train.data.report import DataReport
from vllm_eagle.train.data.rows import Message, Row
from vllm_eagle.train.data.template import ChatTemplate
from vllm_eagle.train.regenerate.filters import DUPLICATE, answer_fault, same_words, user_fault
from vllm_eagle.train.regenerate.rewrite import Dialogue, Generate, Settings, Source, leave
from vllm_eagle.train.regenerate.users import Users

FILE = Path("self")  # stands for the data file of these rows, whose lines count the user turns asked for
TEMPERATURE = 1.0  # of user turns: they are to differ
MOST = 128  # user turns asked for at once: as many as the engine runs at once, and the progress is seen to move
FEWEST = 32  # user turns asked for at once, where fewer are needed: some of them are left out
PATIENCE = 4  # requests for user turns that may give
LEAST = 0.05  # fewer than this share of dialogues, before the run is given up


class OwnTurns(Source):
    """Rows that come from the engine: user turns, until there are `settings.own` dialogues with those written before.

    Args:
        settings: what to do.
        template: the target's.
        users: where a user begins.
        generate: what writes.
        report: gets what is left out, by reason.
        known: rows that earlier runs have written.
    """

    def __init__(
        self,
        settings: Settings,
        template: ChatTemplate,
        users: Users,
        generate: Generate,
        report: DataReport,
        known: list[dict[str, Any]],
    ):
        assert settings.own is not None
        self.total, self.position = settings.own, min(settings.own, len(known))
        self._number = settings.own
        self._settings, self._template, self._users = settings, template, users
        self._generate, self._report, self._num_known = generate, report, len(known)
        self._seen = {same_words(row["messages"][0]["content"]) for row in known}
        self._line = max((row["source"]["line"] for row in known), default=0)
        self._waiting: list[Dialogue] = []
        self._history: deque[tuple[int, int]] = deque(maxlen=PATIENCE + 1)  # user turns asked for, dialogues written

    def next_chunk(self, num_written: int) -> list[Dialogue]:
        """Dialogues with their first user turn.

        Raises:
            ValueError: hardly any user turn that the target writes can be used.
        """
        self.position = min(self._number, self._num_known + num_written)
        missing = self._number - self.position
        while missing and not self._waiting:
            self._check_share(num_written)
            self._waiting = self._first_turns(min(self._settings.chunk, MOST, max(FEWEST, math.ceil(1.25 * missing))))
        chunk, self._waiting = self._waiting[:missing], self._waiting[missing:]
        return chunk

    def follow_up(self, dialogues: list[Dialogue]) -> None:
        """Give each dialogue that may go on its next user turn."""
        asked, prompts = [], []
        for dialogue in dialogues:
            if dialogue.is_finished or dialogue.num_answers >= self._settings.turns:
                continue
            try:
                ids = self._template.encode(self._users.before(dialogue.messages))
            except Exception as error:  # a template is a program of the model's author and may raise anything
                leave(dialogue, self._report, "template error", " ".join(f"{error}".split())[:200])
                continue
            if len(ids) > self._settings.room:
                leave(dialogue, self._report, "too long", f"prompt of {len(ids)} tokens, room for {self._settings.room}")
                continue
            asked.append(dialogue)
            prompts.append(ids)
        for dialogue, (text, finish_reason) in zip(asked, self._write(prompts), strict=True):
            before = {same_words(message["content"]) for message in dialogue.messages if message["role"] == "user"}
            fault = self._fault(text, finish_reason, before)
            if fault is None:
                dialogue.todo.append(_user(text))
            else:
                leave(dialogue, self._report, f"user turn {fault}", _start_of(text))

    def answer_fault(self, text: str) -> str | None:
        """Why an answer is left out."""
        return answer_fault(text, self._users.ends.markers, self._template.tokenizer)

    def _first_turns(self, number: int) -> list[Dialogue]:
        """Usable ones among so many new user turns."""
        prompt = self._template.encode(self._users.before([]))
        chunk = []
        for text, finish_reason in self._write([prompt] * number):
            self._line += 1
            fault = self._fault(text, finish_reason, self._seen)
            if fault is not None:
                self._report.add(FILE, self._line, f"user turn {fault}", _start_of(text))
                continue
            self._seen.add(same_words(text))
            temperature = self._settings.temperatures[self._line % len(self._settings.temperatures)]
            row = Row(FILE, self._line, messages=[_user(text)])
            chunk.append(Dialogue((0, self._line), row, temperature, [_user(text)]))
        self._report.num_rows += number
        return chunk

    def _fault(self, text: str, finish_reason: str, seen: set[str]) -> str | None:
        fault = user_fault(text, finish_reason, self._users.ends.markers, self._template.tokenizer)
        return DUPLICATE if fault is None and same_words(text) in seen else fault

    def _write(self, prompts: list[list[int]]) -> list[tuple[str, str]]:
        if not prompts:
            return []
        return self._generate(prompts, [TEMPERATURE] * len(prompts), self._users.ends.stops)

    def _check_share(self, num_written: int) -> None:
        self._history.append((self._report.num_rows, num_written))
        asked, written = (last - first for first, last in zip(self._history[0], self._history[-1], strict=True))
        if len(self._history) > PATIENCE and written < LEAST * asked:
            raise ValueError(
                f"{self._settings.target}: of the last {asked} user turns that it wrote {written} gave a dialogue, so it seems "
                "to be no chat model that its template fits; write questions into a file and give --data\n"
                + "\n".join(self._report.complaints())
            )


def _user(text: str) -> Message:
    return {"role": "user", "content": text.strip()}


def _start_of(text: str) -> str:
    return repr(text[:40])
