"""What the host wants to know of a step, without waiting for it: copies that are looked at once they have arrived."""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Use = Callable[..., None]  # takes one numpy array per tensor that was sent


class LateReads:
    """Copies in the order in which they were asked for. On a CPU they have arrived at once."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Any, list[torch.Tensor], Use]] = deque()

    def send(self, use: Use, *tensors: torch.Tensor) -> None:
        """Have `use` called, by a later `poll`, with what these tensors hold now."""
        if tensors[0].is_cuda:
            copies = [
                torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True) for tensor in tensors
            ]
            arrived = torch.cuda.Event()
            arrived.record()
        else:
            copies, arrived = [tensor.clone() for tensor in tensors], None
        self._waiting.append((arrived, copies, use))

    def poll(self) -> None:
        """Use what has arrived; never waits."""
        while self._waiting and (self._waiting[0][0] is None or self._waiting[0][0].query()):
            _, copies, use = self._waiting.popleft()
            use(*(np.asarray(copy) for copy in copies))
