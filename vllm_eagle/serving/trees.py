"""The last trees as the page gets them: without words, unless the server's operator allowed them.

Token ids are words, too, so neither they nor request ids leave the server without `show_text`.
"""

import functools
import hashlib
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class TreeView:
    """Takes words out of trees, or puts readable ones in."""

    def __init__(self, decode: Callable[[int], str] | None):
        """`decode` gives the text of a token; without it no text is shown."""
        self._decode = decode
        self._key = secrets.token_bytes(16)  # of this process: names tell requests apart, and nothing else

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Records as `TreeTrace.last` makes them."""
        return [self._view(record) for record in records]

    def _view(self, record: Mapping[str, Any]) -> dict[str, Any]:
        path = [int(node) for node in record["path"]]
        found: dict[str, Any] = {
            "request": self._name(str(record["req_id"])),
            "parents": [int(parent) for parent in record["parents"]],
            "confidence": [_confidence(score) for score in record["scores"]],
            "path": path,
            "num_emitted": len(record["emitted"]),
        }
        if self._decode is not None:
            found["texts"] = [self._decode(int(token)) for token in record["token_ids"]]
            found["emitted"] = [self._decode(int(token)) for token in record["emitted"]]
        return found

    def _name(self, req_id: str) -> str:
        if self._decode is not None:
            return req_id
        return hashlib.blake2b(req_id.encode(), digest_size=3, key=self._key).hexdigest()


def token_text(tokenizer: Any) -> Callable[[int], str]:
    """The text of single tokens, spaces in front included."""

    @functools.lru_cache(maxsize=65536)
    def decode(token: int) -> str:
        # Some tokenizers drop the space in front of a text's first word, so what the second of two adds is what counts.
        once, twice = (str(tokenizer.decode(ids, skip_special_tokens=False)) for ids in ([token], [token, token]))
        return twice.removeprefix(once) if twice.startswith(once) and len(twice) > len(once) else once

    return decode


def _confidence(score: float) -> float | None:
    """The estimated probability that a node is accepted; none if it is no number."""
    return None if math.isnan(score) else round(math.exp(min(score, 0.0)), 4)
