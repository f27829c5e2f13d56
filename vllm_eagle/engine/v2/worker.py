"""The worker that runs draft trees on CUDA: vLLM's GPU worker with its V2 model runner. Not run on a GPU yet."""

from typing import Any

from vllm.config import VllmConfig
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.attention.selector import _cached_get_attn_backend
from vllm.v1.worker.gpu_worker import Worker

from vllm_eagle.engine.v2.runner import EagleTreeRunner
from vllm_eagle.engine.v2.warm_up import warm_up
from vllm_eagle.engine.worker import EagleTreeWorker


class EagleTreeGPUWorker(EagleTreeWorker, Worker):
    """vLLM's GPU worker with a runner that verifies draft trees. Not run on a GPU yet."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        local_rank: int,
        rank: int,
        distributed_init_method: str,
        is_driver_worker: bool = False,
    ):
        self.check(vllm_config)
        from vllm_eagle.attention import cuda

        cuda.register(vllm_config)  # must precede the first attention layer
        _cached_get_attn_backend.cache_clear()  # an engine without trees may have run in this process
        super().__init__(vllm_config, local_rank, rank, distributed_init_method, is_driver_worker)

    def init_device(self) -> None:
        """As vLLM's, which asks `_make_model_runner`; then the runner counts."""
        super().init_device()
        self.model_runner.init_trees(self.new_metrics())

    def _maybe_activate_jit_monitor(self) -> None:
        """As vLLM's, last of its warm-up; before it, what we compile, and what passes cost now that there are CUDA graphs.

        From here on vLLM reports every compilation as one that a request waits for, or fails (`--jit-monitor-mode error`).
        """
        warm_up(self.model_runner)
        self.model_runner.forget_warm_up()
        self.model_runner.measure_costs()
        set_random_seed(self.model_config.seed, self.parallel_config.data_parallel_index)  # as vLLM leaves it
        super()._maybe_activate_jit_monitor()

    def _make_model_runner(self) -> Any:
        """vLLM's factory method."""
        return EagleTreeRunner(self.vllm_config, self.device)
