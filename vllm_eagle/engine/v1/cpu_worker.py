"""The worker that runs draft trees on CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.config import VllmConfig
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_eagle.engine.v1.cpu_runner import EagleTreeCPUModelRunner
from vllm_eagle.engine.worker import EagleTreeWorker


class EagleTreeCPUWorker(EagleTreeWorker, CPUWorker):
    """vLLM's CPU worker with a model runner that verifies draft trees."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        local_rank: int,
        rank: int,
        distributed_init_method: str,
        is_driver_worker: bool = False,
    ):
        self.check(vllm_config)
        # Must precede the first attention layer. The CPU platform offers no other way to choose a backend; the override is
        # per process, and a worker process serves one engine. In-process engines without trees get vLLM's own behaviour from
        # it: rows without a tree go through vLLM's implementation.
        register_backend(AttentionBackendEnum.CPU_ATTN, "vllm_eagle.attention.cpu.TreeCPUAttentionBackend")
        _cached_get_attn_backend.cache_clear()  # an engine without trees may have run in this process
        super().__init__(vllm_config, local_rank, rank, distributed_init_method, is_driver_worker)

    @contextmanager
    def _custom_processors_aside(self) -> Iterator[None]:
        """While vLLM builds its runner.

        vLLM refuses custom logits processors under speculation; the scorer applies them node by node as plain decoding does.
        """
        model_config = self.vllm_config.model_config
        processors, model_config.logits_processors = model_config.logits_processors, None
        try:
            yield
        finally:
            model_config.logits_processors = processors

    def init_device(self) -> None:
        """Build vLLM's runner, then make it ours: CPUWorker has no factory method to override (see patches/)."""
        with self._custom_processors_aside():
            super().init_device()
        if not isinstance(self.model_runner, EagleTreeCPUModelRunner):
            self.model_runner.__class__ = EagleTreeCPUModelRunner
        self.model_runner.init_trees(self.new_metrics())

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Measure what passes cost; then as vLLM's, which resets the random state at the end."""
        self.model_runner.measure_costs()
        return super().compile_or_warm_up_model()

    def _make_model_runner(self) -> EagleTreeCPUModelRunner:
        """Used where patches/cpu_worker_factory.patch gives CPUWorker this seam, as the GPU worker has it."""
        return EagleTreeCPUModelRunner(self.vllm_config, self.device)
