"""What the head has not yet seen of requests for which nothing was drafted.

While drafting does not pay, the head is not run over the tokens that the target commits: at full load even one layer more costs.
Their features wait here, and the head catches up when drafting pays again. There is room for a limited number of tokens, in memory
that is allocated once; a request for which there is none decodes to its end without drafts.

What still waits when its request ends is dropped. Where a later prompt finds such tokens in the prefix cache, the head lacks their
keys and values: it drafts worse after them, and the target's tokens are the same. To run the head over them in time would cost
every request at full load, for those few that are continued when there is none.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from vllm.utils.torch_utils import async_tensor_h2d


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one request, as the target's pass left them."""

    start: int  # place of the first one in the context
    token_ids: torch.Tensor  # [num_tokens]
    positions: torch.Tensor  # [num_tokens], with M-RoPE [3, num_tokens]
    features: torch.Tensor  # [num_tokens, hidden], EAGLE-3: [num_tokens, num_aux * hidden]

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, part: slice) -> "Piece":
        """A part of it, in steps of one."""
        start, _, _ = part.indices(len(self))
        return Piece(self.start + start, self.token_ids[part], self.positions[..., part], self.features[part])


class Backlog:
    """Tokens by request id, in their order."""

    def __init__(self, most_tokens: int):
        self._free = list(range(most_tokens))[::-1]  # places; those used before are used first, so memory is touched as needed
        self._places: dict[str, list[int]] = {}
        self._starts: dict[str, int] = {}
        self._lost: set[str] = set()
        # By place; allocated when types are known.
        self._token_ids, self._positions, self._features = torch.empty(0), torch.empty(0), torch.empty(0)

    def keep(
        self, token_ids: torch.Tensor, positions: torch.Tensor, features: torch.Tensor, parts: Mapping[str, tuple[int, range]]
    ) -> None:
        """Copy tokens of a pass, which follow on those kept before; where there is no room, lose the request.

        Args:
            token_ids: of the pass, [num_tokens].
            positions: likewise, [num_tokens], with M-RoPE [3, num_tokens].
            features: likewise, [num_tokens, hidden].
            parts: by request id, the place of its first token in the context, and which tokens of the pass are its own.
        """
        sources: list[int] = []
        places: list[int] = []
        for req_id, (start, part) in parts.items():
            if req_id in self._lost:
                continue
            if len(part) > len(self._free):
                self.forget(req_id)
                self._lost.add(req_id)
                continue
            taken = [self._free.pop() for _ in part]
            self._starts.setdefault(req_id, start)
            self._places.setdefault(req_id, []).extend(taken)
            sources += part
            places += taken
        if not sources:
            return
        if self._features.shape[1:] != features.shape[1:]:
            most_tokens = len(self._free) + sum(map(len, self._places.values()))
            self._token_ids = token_ids.new_empty(most_tokens)
            self._positions = positions.new_empty(*positions.shape[:-1], most_tokens)
            self._features = features.new_empty(most_tokens, *features.shape[1:])
        to, of = (async_tensor_h2d(rows, device=features.device, dtype=torch.long) for rows in (places, sources))
        self._token_ids[to] = token_ids[of]
        self._positions[..., to] = positions[..., of]
        self._features[to] = features[of]

    def is_lost(self, req_id: str) -> bool:
        """Whether the head can no longer follow this request."""
        return req_id in self._lost

    def waiting(self, req_id: str) -> int:
        """Tokens of a request that the head has not seen yet."""
        return len(self._places.get(req_id, ()))

    def take(self, req_id: str) -> Piece | None:
        """What the head has to see before it sees the request's newest tokens; from here on it has."""
        places = self._places.get(req_id)
        if not places:
            return None
        rows = async_tensor_h2d(places, device=self._features.device, dtype=torch.long)
        piece = Piece(self._starts[req_id], self._token_ids[rows], self._positions[..., rows], self._features[rows])
        self._drop(req_id)
        return piece

    def forget(self, req_id: str) -> None:
        """The request has ended, or the target computes it anew from its first token."""
        self._drop(req_id)
        self._lost.discard(req_id)

    def _drop(self, req_id: str) -> None:
        self._free += reversed(self._places.pop(req_id, []))
        self._starts.pop(req_id, None)


def batches(waiting: Sequence[tuple[int, Piece]], most_tokens: int) -> Iterator[list[tuple[int, Piece]]]:
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
            batch.append((row, piece[:room]))
            room, piece = room - len(batch[-1][1]), piece[room:]
    if batch:
        yield batch


def join(pieces: Sequence[Piece]) -> Piece:
    """Consecutive pieces as one."""
    return Piece(
        pieces[0].start,
        torch.cat([p.token_ids for p in pieces]),
        torch.cat([p.positions for p in pieces], dim=-1),
        torch.cat([p.features for p in pieces]),
    )
