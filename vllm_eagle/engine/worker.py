"""What the workers of all devices share (v1/cpu_worker.py, v2/worker.py): checks, counters, and calls from outside.

vLLM loads workers by name (`worker_cls`), so a stock vLLM needs no change.
"""

import weakref
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.worker.gpu_worker import Worker

from vllm_eagle.engine import seams, support
from vllm_eagle.metrics import stats_file
from vllm_eagle.metrics.counters import TreeMetrics

logger = init_logger(f"vllm.{__name__}")  # below "vllm", so that vLLM shows it with its own lines


class EagleTreeWorker(Worker):
    """A mixin: to be put before the worker of a device, which all derive from vLLM's. Their runner has trees."""

    @staticmethod
    def check(vllm_config: VllmConfig) -> None:
        """Refuse what cannot run, before anything is built.

        Raises:
            ValueError: another vLLM, its other runner, or whatever else support.py refuses.
        """
        seams.check_seams()
        support.check_supported(vllm_config)

    def new_metrics(self) -> TreeMetrics:
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
