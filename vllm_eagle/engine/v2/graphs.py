"""Drafting in full CUDA graphs: all levels of a batch's trees as one, by vLLM's own machinery.

vLLM captures its loop over a chain for each padded number of requests. Trees are captured in its place, and besides for each way
of drafting that the host can tell apart: captured is what all of a batch's requests need, and no more.

Captured levels are as wide as they may be. Where the budget plans less, a graph drafts more than was planned, never less: while a
pass has few rows that takes no longer. Where a graph would do far more than is planned, the levels run launch by launch instead
(`TreeSpeculator._draft`). What is emitted does not depend on it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import SpeculatorCudaGraphManager


@dataclass(frozen=True, slots=True)
class Way:
    """How a batch is drafted."""

    depth: int  # levels
    has_noise: bool  # some request samples, and drafting is coupled to its noise
    is_filtered: bool  # some request has top-k or top-p, so it samples


def ways(depth_limit: int, is_coupled: bool) -> list[Way]:
    """Those that are captured: to the full depth and to half of it. Other depths take the next greater, if it is not far."""
    depths = sorted({depth_limit, (depth_limit + 1) // 2})
    greedy, sampled, filtered = (False, False), (is_coupled, False), (is_coupled, True)
    return [Way(depth, *kind) for depth in depths for kind in dict.fromkeys((greedy, sampled, filtered))]


@dataclass(frozen=True)
class DraftDescriptor(BatchExecutionDescriptor):
    """What a graph was captured for."""

    way: Way | None = None


class DraftGraphs(SpeculatorCudaGraphManager):
    """In the place of the manager of vLLM's loop over a chain."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        mode: CUDAGraphMode,
        captured: Sequence[Way],
        most_reqs: int,  # for which trees can be drafted at a time
        draft: Callable[[int, Way], None],  # takes the padded number of requests; reads and writes fixed tensors alone
    ):
        super().__init__(vllm_config, device, mode, decode_query_len=1)
        self._draft, self._ways = draft, captured
        self._capture_descs = {
            mode: [DraftDescriptor(**vars(desc), way=way) for desc in descs if desc.num_reqs <= most_reqs for way in captured]
            for mode, descs in self._capture_descs.items()
        }

    def capture(self, *args: Any, progress_bar_desc: str = "", **kwargs: Any) -> None:
        """Called by vLLM with its own loop and what that needs, which is left alone."""

        def prepared(desc: DraftDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            assert desc.num_reqs is not None
            assert desc.way is not None
            return lambda mode: self._draft(desc.num_reqs, desc.way)

        CudaGraphManager.capture(self, prepared, progress_bar_desc)

    def found(self, num_reqs: int, way: Way) -> DraftDescriptor | None:
        """The graph that drafts so, or deeper, but not more than twice as deep; None: there is none."""
        desc = self.dispatch(num_reqs, num_reqs, uniform_token_count=1, num_active_loras=0)
        deep = sorted({each.depth for each in self._ways if way.depth <= each.depth <= 2 * way.depth})
        if desc.cg_mode != CUDAGraphMode.FULL or not deep:
            return None
        drafted = DraftDescriptor(**vars(desc), way=replace(way, depth=deep[0]))
        return drafted if drafted in self.graphs else None
