"""A JSONL file that grows in chunks and that a second run continues, if it was started with the same arguments."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_eagle import files


class Journal:
    """Rows of finished work in `path`, the arguments that they were made with beside it in `path`.meta.json.

    Args:
        path: the file, created by the first append.
        arguments: what the rows depend on, as JSON values.

    Raises:
        ValueError: the file was made with other arguments, is broken elsewhere than at its end, or its folder does not exist.
    """

    def __init__(self, path: Path, arguments: dict[str, Any]):
        self.path = path
        if not path.parent.is_dir():
            raise ValueError(f"{path}: its folder does not exist; create it or choose another --out")
        meta = path.with_name(path.name + ".meta.json")
        if meta.is_file():
            try:
                before = json.loads(meta.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{meta}: cannot be read ({error}); choose another --out, or delete it and {path.name}") from None
            _compare(path, before, arguments)
        elif path.exists():
            raise ValueError(f"{path}: exists, but {meta.name} does not say how it was made; choose another --out or delete it")
        else:
            files.write_text(meta, json.dumps(arguments, indent=1))

    def rows(self) -> list[dict[str, Any]]:
        """What earlier runs finished. A last line that a killed run left unfinished is cut off the file."""
        if not self.path.exists():
            return []
        rows, good = [], 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    if not line.endswith(b"\n"):
                        break
                    rows.append(json.loads(line))
                except ValueError:
                    if lines.read(1):
                        raise ValueError(f"{self.path}, line {number}: no JSON; repair the line or choose another --out") from None
                    break
                good += len(line)
        os.truncate(self.path, good)
        return rows

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows, on disk when this returns."""
        with files.writing(self.path), self.path.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            out.flush()
            os.fsync(out.fileno())


def _compare(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key in now:
        if before.get(key) != now[key]:
            raise ValueError(
                f"{path}: was made with {key} {before.get(key)!r}, not {now[key]!r}; choose another --out, or repeat the arguments"
            )
