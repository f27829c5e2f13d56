"""The target's features on disk, so that later epochs need no target: one growing file with a size bound.

An epoch visits every example once, so what was used longest ago comes next: replacing old entries would never hit. What fits first
stays; the rest is computed anew.
"""

import json
from pathlib import Path
from typing import Any

import torch

from vllm_eagle.train.target import Features


class FeatureCache:
    """Features by example, up to `max_bytes`.

    Raises:
        ValueError: the folder holds features of another target, data set or setting.
    """

    def __init__(self, folder: Path, max_bytes: int, identity: dict[str, Any], rank: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self._data, self._index_path = folder / f"features.{rank}.bin", folder / f"index.{rank}.jsonl"
        self._max_bytes = max_bytes
        self._index: dict[int, tuple[int, int, list[int], str]] = {}  # key -> offset, length, widths, dtype
        header = {"identity": identity}
        if self._index_path.exists():
            lines = self._index_path.read_text().splitlines()
            if not lines or json.loads(lines[0]) != header:
                raise ValueError(
                    f"--cache-dir {folder} holds features of another target, data set or setting; empty it or name another"
                )
            for i, line in enumerate(lines[1:], start=1):
                try:
                    key, *entry = json.loads(line)
                except json.JSONDecodeError:  # the line being written when a run was killed
                    self._index_path.write_text("".join(line + "\n" for line in lines[:i]))
                    break
                self._index[key] = tuple(entry)
        else:
            self._index_path.write_text(json.dumps(header) + "\n")
            self._data.write_bytes(b"")
        self._end = max(
            (offset + self._size(length, widths, dtype) for offset, length, widths, dtype in self._index.values()), default=0
        )

    def __len__(self) -> int:
        return len(self._index)

    def get(self, key: int) -> Features | None:
        """Features of one example, [1, length, width] each."""
        if key not in self._index:
            return None
        offset, length, widths, dtype = self._index[key]
        with self._data.open("rb") as file:
            file.seek(offset)
            raw = bytearray(file.read(self._size(length, widths, dtype)))
        both = torch.frombuffer(raw, dtype=getattr(torch, dtype)).view(1, length, sum(widths))
        last, fused = both.split(widths, dim=-1)
        return Features(last, fused)

    def put(self, key: int, features: Features, length: int) -> None:
        """Keep the first `length` positions of features [1, >= length, width], if there is room."""
        both = torch.cat([features.last, features.fused], dim=-1)[0, :length].contiguous().cpu()
        size = both.numel() * both.element_size()
        if key in self._index or self._end + size > self._max_bytes:
            return
        widths, dtype = [features.last.shape[-1], features.fused.shape[-1]], str(both.dtype).removeprefix("torch.")
        with self._data.open("r+b") as file:
            file.seek(self._end)
            file.write(both.view(torch.uint8).numpy().tobytes())
        # The index follows the data: an entry without complete data cannot exist.
        with self._index_path.open("a") as file:
            file.write(json.dumps([key, self._end, length, widths, dtype]) + "\n")
        self._index[key] = (self._end, length, widths, dtype)
        self._end += size

    @staticmethod
    def _size(length: int, widths: list[int], dtype: str) -> int:
        return length * sum(widths) * getattr(torch, dtype).itemsize


def stack(features: list[Features], width: int) -> Features:
    """Single examples [1, length, .] -> one batch [batch, width, .], zeros where a text has ended."""

    def pad(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, width - x.shape[1]))

    return Features(torch.cat([pad(f.last) for f in features]), torch.cat([pad(f.fused) for f in features]))
