"""The worker of the test bed: vLLM's CPU worker with its V2 runner, and ours put before that."""

from functools import partial
from typing import Any

import torch
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.attention.backends.mla.triton_mla import TritonMLABackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.attention.selector import _cached_get_attn_backend
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.workspace import init_workspace_manager

from vllm_eagle.attention.cuda import TreeTritonAttentionBackend
from vllm_eagle.attention.flash import TreeFlashAttentionBackend
from vllm_eagle.attention.xformers import TreeXFormersBackend
from vllm_eagle.engine.v2.runner import EagleTreeRunner
from vllm_eagle.engine.worker import EagleTreeWorker


class _InCPUsPlace:
    """vLLM's CPU platform knows one name of attention only."""

    @staticmethod
    def get_name() -> str:
        """The name of CPU attention."""
        return "CPU_ATTN"


class TritonInCPUsPlace(_InCPUsPlace, TreeTritonAttentionBackend):
    """The attention of GPUs."""


class StockInCPUsPlace(_InCPUsPlace, TritonAttentionBackend):
    """vLLM's own."""


class FlashInCPUsPlace(_InCPUsPlace, TreeFlashAttentionBackend):
    """As the first one, with what stands in for FlashAttention's kernels (flash_by_torch.py)."""


class XFormersInCPUsPlace(_InCPUsPlace, TreeXFormersBackend):
    """Likewise."""


_LATENT = {
    "triton": "vllm_eagle.attention.mla.TreeMLABackend",
    "stock": f"{TritonMLABackend.__module__}.{TritonMLABackend.__name__}",
}
_BACKENDS = {
    "triton": f"{__name__}.TritonInCPUsPlace",
    "exact": f"{__name__}.TritonInCPUsPlace",
    "flash": f"{__name__}.FlashInCPUsPlace",
    "xformers": f"{__name__}.XFormersInCPUsPlace",
    "stock": f"{__name__}.StockInCPUsPlace",
    "cpu": "vllm_eagle.attention.cpu.TreeCPUAttentionBackend",
}


def register(attention: str | None) -> None:
    """Put a backend in the place of the CPU's; None: vLLM's own is there again."""
    # Of those for latents the platform takes one or the other, by what the processor can do.
    places = {
        AttentionBackendEnum.CPU_ATTN: _BACKENDS,
        AttentionBackendEnum.CPU_MLA: _LATENT,
        AttentionBackendEnum.AMX_MLA: _LATENT,
    }
    for place, backends in places.items():
        if attention in backends:
            register_backend(place, backends[attention])
        else:
            place.clear_override()
    _cached_get_attn_backend.cache_clear()


class TreeV2Runner(EagleTreeRunner, CPUModelRunner):
    """Trees in vLLM's V2 runner for CPUs."""

    def _prepare_moves(self) -> None:
        """As on a GPU, but vLLM's CPU attention packs its cache in another way, which its implementation knows."""
        layers = list(self._target_layers())
        if not hasattr(layers[0][1][0].impl, "move_slots"):
            super()._prepare_moves()
            return
        self._moves = [(gid, partial(_move, alike, self.block_tables.block_sizes[gid])) for gid, alike in layers]


def _move(layers: Any, block_size: int, block_table: torch.Tensor, context_lens: torch.Tensor, paths: torch.Tensor) -> None:
    accepted = paths > 0
    depths = torch.arange(1, paths.shape[1] + 1)
    rows = torch.arange(len(paths))[:, None].expand_as(paths)[accepted]

    def slots(positions: torch.Tensor) -> torch.Tensor:
        return block_table[rows, positions // block_size].long() * block_size + positions % block_size

    sources, targets = ((context_lens[:, None] + places)[accepted] for places in (paths, depths))
    layers[0].impl.move_slots(layers, slots(sources), slots(targets))


class TreeV2Worker(EagleTreeWorker, CPUWorker):
    """vLLM's CPU worker imports its runner by name while the device is set up."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any):
        self.check(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)

    def init_device(self) -> None:
        """As vLLM's, with our runner."""
        import vllm.v1.worker.cpu.model_runner as module

        stock, module.CPUModelRunner = module.CPUModelRunner, TreeV2Runner  # type: ignore[misc]
        try:
            super().init_device()
        finally:
            module.CPUModelRunner = stock  # type: ignore[misc]
        self.model_runner.init_trees(self.new_metrics())

    def compile_or_warm_up_model(self) -> Any:
        """Capture graphs, if any are asked for (graphs.py); then as vLLM's, and as our worker for GPUs after its warm-up."""
        if self.model_runner.needs_cudagraph_capture():
            init_workspace_manager(self.device)  # as vLLM's worker for GPUs
            self.model_runner.capture_model()
        found = super().compile_or_warm_up_model()
        self.model_runner.forget_warm_up()
        self.model_runner.measure_costs()
        set_random_seed(self.model_config.seed, self.parallel_config.data_parallel_index)
        return found
