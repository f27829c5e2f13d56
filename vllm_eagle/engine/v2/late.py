"""What the host wants to know of a step, without waiting for it: copies and times that are looked at once they have arrived."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

Use = Callable[..., None]  # takes one numpy array per tensor that was sent, then the seconds between marks, if any were
Mark = Any  # a CUDA event, or a time of the clock where nothing runs behind the host's back


class LateReads:
    """Copies in the order in which they were asked for. On a CPU they have arrived at once."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._waiting: deque[tuple[Any, list[torch.Tensor], Sequence[Mark], Use]] = deque()

    def mark(self) -> Mark:
        """This moment of the device's time."""
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def send(self, use: Use, *tensors: torch.Tensor, marks: Sequence[Mark] = ()) -> None:
        """Have `use` called, by a later `poll`, with what these tensors hold now, and with the seconds from mark to mark."""
        if self._is_cuda:
            copies = [
                torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True) for tensor in tensors
            ]
            arrived = torch.cuda.Event()
            arrived.record()
        else:
            copies, arrived = [tensor.clone() for tensor in tensors], None
        self._waiting.append((arrived, copies, marks, use))

    def poll(self) -> None:
        """Use what has arrived; never waits."""
        while self._waiting and (self._waiting[0][0] is None or self._waiting[0][0].query()):
            _, copies, marks, use = self._waiting.popleft()
            seconds = ([self._seconds(*pair) for pair in pairwise(marks)],) if marks else ()
            use(*(np.asarray(copy) for copy in copies), *seconds)

    def _seconds(self, start: Mark, end: Mark) -> float:
        return float(start.elapsed_time(end)) / 1000 if self._is_cuda else float(end - start)
