"""The target's features on disk, so that later epochs need no target: one growing file with a size bound.

An epoch visits every example once, so what was used longest ago comes next: replacing old entries would never hit. What fits first
stays; the rest is computed anew.
"""

import fcntl
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_eagle import files
from vllm_eagle.train.features.target import Features


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where an example's features lie."""

    rank: int
    offset: int  # bytes
    length: int  # positions
    widths: list[int]  # of both kinds of features
    dtype: str

    @property
    def size(self) -> int:
        return self.length * sum(self.widths) * int(getattr(torch, self.dtype).itemsize)


class FeatureCache:
    """Features by example, up to `max_bytes`. Every process writes a file of its own and reads all of them.

    Features of one example can differ in the last bits with the batch that the target saw them in, so a run that fills a cache only
    in part need not equal, bit for bit, one without.

    Raises:
        ValueError: the folder holds features of another target, data set or setting, or another run is using it.
    """

    def __init__(self, folder: Path, max_bytes: int, identity: dict[str, Any], rank: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._max_bytes, self._rank = folder, max_bytes, rank
        self._header = {"identity": identity}
        self._entries: dict[int, _Entry] = {}
        data, index = self._files(rank)
        self._lock = (folder / f"lock.{rank}").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"--cache-dir {folder} is in use by another run; wait for it or name another folder") from None
        if not index.exists():
            data.write_bytes(b"")
            index.write_text(json.dumps(self._header) + "\n")
        kept = self._read_index(rank)
        # A line that was being written when a run was killed goes, so that the next one starts on a line of its own.
        index.write_text("".join(index.read_text().splitlines(keepends=True)[: 1 + kept]))
        self._end = max((entry.offset + entry.size for entry in self._entries.values()), default=0)
        self.refresh()

    def __len__(self) -> int:
        return len(self._entries)

    def close(self) -> None:
        """Let others use the folder."""
        self._lock.close()

    def refresh(self) -> None:
        """Learn what other processes have kept meanwhile."""
        for path in self._folder.glob("index.*.jsonl"):
            rank = int(path.name.split(".")[1])
            if rank != self._rank:
                self._read_index(rank)

    def get(self, key: int) -> Features | None:
        """Features of one example, [1, length, width] each."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        with self._files(entry.rank)[0].open("rb") as file:
            file.seek(entry.offset)
            raw = bytearray(file.read(entry.size))
        both = torch.frombuffer(raw, dtype=getattr(torch, entry.dtype)).view(1, entry.length, sum(entry.widths))
        last, fused = both.split(entry.widths, dim=-1)
        return Features(last, fused)

    def put(self, key: int, features: Features, length: int) -> None:
        """Keep the first `length` positions of features [1, >= length, width], if there is room.

        Raises:
            ValueError: the disk is full before `max_bytes` are written.
        """
        widths, dtype = [features.last.shape[-1], features.fused.shape[-1]], str(features.last.dtype).removeprefix("torch.")
        entry = _Entry(self._rank, self._end, length, widths, dtype)
        if key in self._entries or self._end + entry.size > self._max_bytes:
            return
        both = torch.cat([features.last, features.fused], dim=-1)[0, :length].contiguous().cpu()
        data, index = self._files(self._rank)
        with files.writing(data), data.open("r+b") as file:
            file.seek(self._end)
            file.write(both.view(torch.uint8).numpy().tobytes())
        # The index follows the data: an entry without complete data cannot exist.
        with files.writing(index), index.open("a") as lines:
            lines.write(json.dumps([key, self._end, length, widths, dtype]) + "\n")
        self._entries[key] = entry
        self._end += entry.size

    def _files(self, rank: int) -> tuple[Path, Path]:
        return self._folder / f"features.{rank}.bin", self._folder / f"index.{rank}.jsonl"

    def _read_index(self, rank: int) -> int:
        """Add a process's entries; returns how many complete lines it has."""
        lines = self._files(rank)[1].read_text().splitlines()
        if not lines or json.loads(lines[0]) != self._header:
            raise ValueError(
                f"--cache-dir {self._folder} holds features of another target, data set or setting; empty it or name another"
            )
        for number, line in enumerate(lines[1:]):
            try:
                key, *rest = json.loads(line)
            except json.JSONDecodeError:
                return number
            self._entries.setdefault(key, _Entry(rank, *rest))
        return len(lines) - 1


def stack(features: list[Features], width: int) -> Features:
    """Single examples [1, length, .] -> one batch [batch, width, .], zeros where a text has ended."""

    def pad(x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > width:
            raise ValueError(f"features of {x.shape[1]} positions for a batch of {width}; the cache is of other data")
        return torch.nn.functional.pad(x, (0, 0, 0, width - x.shape[1]))

    return Features(torch.cat([pad(f.last) for f in features]), torch.cat([pad(f.fused) for f in features]))
