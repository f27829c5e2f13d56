"""What the head has not yet seen of requests for which nothing was drafted.

While drafting does not pay, the head is not run over the tokens that the target commits: at full load even one layer more costs.
Their features wait here, and the head catches up when drafting pays again. There is room for a limited number of tokens; a request
for which there is none decodes to its end without drafts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one request, as the target's pass left them."""

    start: int  # position of the first one
    token_ids: torch.Tensor  # [num_tokens]
    features: torch.Tensor  # [num_tokens, hidden], EAGLE-3: [num_tokens, num_aux * hidden]

    def __len__(self) -> int:
        return len(self.token_ids)


class Backlog:
    """Pieces by request id, oldest first."""

    def __init__(self, most_tokens: int):
        self._most_tokens = most_tokens
        self._pieces: dict[str, list[Piece]] = {}
        self._waiting: dict[str, int] = {}  # tokens of them
        self._lost: set[str] = set()
        self.num_tokens = 0

    def add(self, req_id: str, piece: Piece) -> None:
        """Keep a piece that follows on the last one; where there is no room, lose the request."""
        if req_id in self._lost:
            return
        if self.num_tokens + len(piece) > self._most_tokens:
            self.forget(req_id)
            self._lost.add(req_id)
            return
        self._pieces.setdefault(req_id, []).append(piece)
        self._waiting[req_id] = self.waiting(req_id) + len(piece)
        self.num_tokens += len(piece)

    def is_lost(self, req_id: str) -> bool:
        """Whether the head can no longer follow this request."""
        return req_id in self._lost

    def waiting(self, req_id: str) -> int:
        """Tokens of a request that the head has not seen yet."""
        return self._waiting.get(req_id, 0)

    def take(self, req_id: str) -> list[Piece]:
        """What the head has to see before it sees the request's newest tokens; from here on it has."""
        self.num_tokens -= self._waiting.pop(req_id, 0)
        return self._pieces.pop(req_id, [])

    def forget(self, req_id: str) -> None:
        """The request has ended, or the target computes it anew from its first token."""
        self.take(req_id)
        self._lost.discard(req_id)


def batches(waiting: list[tuple[int, Piece]], most_tokens: int) -> Iterator[list[tuple[int, Piece]]]:
    """Cut pieces (row in the batch, piece) into passes of at most so many tokens, each row at most once in a pass.

    A row's pieces come in their order.
    """
    batch: list[tuple[int, Piece]] = []
    room = most_tokens
    for row, piece in waiting:
        while len(piece):
            if room == 0 or any(row == other for other, _ in batch):
                yield batch
                batch, room = [], most_tokens
            now = min(room, len(piece))
            batch.append((row, Piece(piece.start, piece.token_ids[:now], piece.features[:now])))
            piece = Piece(piece.start + now, piece.token_ids[now:], piece.features[now:])
            room -= now
    if batch:
        yield batch


def join(pieces: list[Piece]) -> Piece:
    """Consecutive pieces as one."""
    return Piece(pieces[0].start, torch.cat([p.token_ids for p in pieces]), torch.cat([p.features for p in pieces]))
