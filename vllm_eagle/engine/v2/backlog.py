"""What the head has not yet seen of requests for which nothing was drafted.

While drafting does not pay, the head is not run over the tokens that decoding commits: a step that neither verifies nor drafts is
vLLM's own, but for one copy of the target's features to here. The head catches up (catching_up.py) before it is run again: when
drafting pays, when prompts come, which it sees at once, and when there is no more room. What waits when its request ends is
dropped. Where a later prompt finds such tokens in the prefix cache, the head drafts worse after them, and tokens are the same.

In such a step every request commits one token, so the host knows how many wait, and reads nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

BACKLOG_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """What waits of some requests, taken out."""

    counts: np.ndarray  # [num_reqs] int64, tokens of each request, as they were asked for
    features: torch.Tensor  # [sum of counts, width], request by request, each in its order


class Backlog:
    """Features of tokens, in the order in which steps left them; the memory is allocated once."""

    def __init__(self, num_slots: int, dtype: torch.dtype, device: torch.device, num_bytes: int = BACKLOG_BYTES):
        self._num_slots = num_slots
        self._memory = torch.empty(num_bytes // dtype.itemsize, dtype=dtype, device=device)
        self._slots = np.full(0, -1, dtype=np.int64)  # [most_rows], of which slot; -1: nobody's. Known at the first `keep`
        self._used = 0  # rows
        self._lost = np.zeros(num_slots, dtype=bool)

    def keep(self, slots: np.ndarray, features: Sequence[torch.Tensor]) -> bool:
        """Keep a token of each of these requests; False if there is no room.

        `features`: of their tokens, [at least num_reqs, hidden] each; those of one token stand side by side here.
        """
        width, number = sum(each.shape[1] for each in features), len(slots)
        if not len(self._slots):
            self._slots = np.full(len(self._memory) // width, -1, dtype=np.int64)
        if self._used + number > len(self._slots):
            return False
        rows, left = self._rows(width)[self._used : self._used + number], 0
        for each in features:
            rows[:, left : left + each.shape[1]] = each[:number]
            left += each.shape[1]
        self._slots[self._used : self._used + number] = slots
        self._used += number
        return True

    def _rows(self, width: int) -> torch.Tensor:
        return self._memory[: len(self._slots) * width].view(-1, width)

    def take(self, slots: np.ndarray) -> Waiting | None:
        """What waits of these requests: the head sees it now. None: nothing does.

        What waits of others is lost if there would be no room for another step.
        """
        if not self._used:
            return None
        place_of_slot = np.full(self._num_slots + 1, -1)  # the last one: of nobody
        place_of_slot[slots] = np.arange(len(slots))
        places = place_of_slot[self._slots[: self._used]]
        rows = np.argsort(places, kind="stable")[np.count_nonzero(places < 0) :]
        if not len(rows):
            self._lose_if_full(len(slots))
            return None
        features = self._rows(len(self._memory) // len(self._slots))[async_tensor_h2d(rows, device=self._memory.device)]
        self._slots[rows] = -1
        self._clean()
        self._lose_if_full(len(slots))
        return Waiting(np.bincount(places[rows], minlength=len(slots)), features)

    def _lose_if_full(self, number: int) -> None:
        if self._used + number > len(self._slots):
            self._lost[self._slots[self._slots >= 0]] = True
            self._slots[:], self._used = -1, 0

    def is_lost(self, slot: int) -> bool:
        """Whether the head lacks tokens of this request, for which it can no longer draft."""
        return bool(self._lost[slot])

    def forget(self, slot: int) -> None:
        """The slot has another request."""
        self._lost[slot] = False
        self._slots[: self._used][self._slots[: self._used] == slot] = -1
        self._clean()

    def _clean(self) -> None:
        if (self._slots[: self._used] < 0).all():
            self._used = 0
