"""Dialogues of data files: their user turns, and where answers are due."""

from collections.abc import Iterator
from itertools import islice

from vllm_eagle.train.data.report import DataReport
from vllm_eagle.train.data.rows import Row, iter_rows
from vllm_eagle.train.regenerate.rewrite import Dialogue, Key, Settings, Source


class FileTurns(Source):
    """Rows of `settings.data` but those of `done`; `report` gets the ones that cannot be used."""

    def __init__(self, settings: Settings, report: DataReport, done: set[Key]):
        self.total, self.position = settings.limit, 0
        self._settings, self._report = settings, report
        self._waiting = self._dialogues(done)

    def next_chunk(self, num_written: int) -> list[Dialogue]:
        """Dialogues in the order of the files."""
        return list(islice(self._waiting, self._settings.chunk))

    def _dialogues(self, done: set[Key]) -> Iterator[Dialogue]:
        temperatures = self._settings.temperatures
        for number, (key, row) in enumerate(islice(self._rows(), self._settings.limit)):
            self.position = number + 1
            if key not in done:
                yield Dialogue(key, row, temperatures[number % len(temperatures)], list(row.messages or []))

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
