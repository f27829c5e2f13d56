"""Workers that run draft trees. vLLM loads them by name (`worker_cls`), so a stock vLLM needs no change."""

import weakref
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_eagle import stats_file
from vllm_eagle.engine import seams, support
from vllm_eagle.engine.runner import EagleTreeCPUModelRunner
from vllm_eagle.metrics import TreeMetrics

logger = init_logger(f"vllm.{__name__}")  # below "vllm", so that vLLM shows it with its own lines


class EagleTreeCPUWorker(CPUWorker):
    """vLLM's CPU worker with a model runner that verifies draft trees."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        local_rank: int,
        rank: int,
        distributed_init_method: str,
        is_driver_worker: bool = False,
    ):
        seams.check_seams()
        support.check_supported(vllm_config)
        # Must precede the first attention layer. The CPU platform offers no other way to choose a backend; the override is
        # per process, and a worker process serves one engine. In-process engines without trees get vLLM's own behaviour from
        # it: rows without a tree go through vLLM's implementation.
        register_backend(AttentionBackendEnum.CPU_ATTN, "vllm_eagle.attention.cpu.TreeCPUAttentionBackend")
        _cached_get_attn_backend.cache_clear()  # an engine without trees may have run in this process
        super().__init__(vllm_config, local_rank, rank, distributed_init_method, is_driver_worker)

    def init_device(self) -> None:
        """Build vLLM's runner, then make it ours: CPUWorker has no factory method to override (see patches/)."""
        model_config = self.vllm_config.model_config
        # vLLM refuses custom logits processors under speculation; the scorer applies them node by node as plain decoding does.
        processors, model_config.logits_processors = model_config.logits_processors, None
        try:
            super().init_device()
        finally:
            model_config.logits_processors = processors
        if not isinstance(self.model_runner, EagleTreeCPUModelRunner):
            self.model_runner.__class__ = EagleTreeCPUModelRunner
        self.model_runner.init_trees(self._metrics())

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Measure what passes cost; then as vLLM's, which resets the random state at the end."""
        self.model_runner.measure_costs()
        return super().compile_or_warm_up_model()

    def _metrics(self) -> TreeMetrics:
        """Counters, which the server's front end can see if both are on one machine."""
        if self.rank != 0:
            return TreeMetrics()
        path = stats_file.path_of(self.vllm_config.instance_id)
        try:
            metrics = TreeMetrics(stats_file.create(path))
        except OSError as error:
            logger.warning("No counters for /metrics: %s cannot be written (%s).", path, error)
            return TreeMetrics()
        weakref.finalize(self, stats_file.remove, path)  # not every way to end an engine shuts its workers down
        return metrics

    def shutdown(self) -> None:
        """Leave nothing behind."""
        super().shutdown()
        if self.rank == 0:
            stats_file.remove(stats_file.path_of(self.vllm_config.instance_id))

    def _make_model_runner(self) -> EagleTreeCPUModelRunner:
        """Used where patches/cpu_worker_factory.patch gives CPUWorker this seam, as the GPU worker has it."""
        return EagleTreeCPUModelRunner(self.vllm_config, self.device)

    def eagle_stats(self) -> dict[str, Any]:
        """Counters since start or since the last call of `reset_eagle_stats`; reachable through `collective_rpc`."""
        return self.model_runner.tree_metrics.as_dict()

    def reset_eagle_stats(self) -> None:
        """Set the counters to zero."""
        self.model_runner.tree_metrics.reset()

    def eagle_recent_trees(self) -> list[dict[str, object]]:
        """The last verified trees, newest first: request id, token ids, parents, scores, accepted nodes, emitted tokens."""
        return self.model_runner.tree_trace.last()

    def eagle_trace(self, num_steps: int) -> None:
        """Record the next steps' trees and accepted paths; 0 stops."""
        self.model_runner.tree_trace.start(num_steps)

    def eagle_traced(self) -> list[dict[str, object]]:
        """What was recorded, like `eagle_recent_trees`, oldest first."""
        return self.model_runner.tree_trace.records
