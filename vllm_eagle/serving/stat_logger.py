"""Prometheus metrics and a log line, through vLLM's entry point group `vllm.stat_logger_plugins`.

vLLM makes one logger per front end of a server. In tree mode it puts a collector into the registry behind vLLM's /metrics;
otherwise it does nothing.
"""

import time
import weakref
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import REGISTRY
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from vllm_eagle.algorithm.config import CONFIG_KEY, TreeConfig
from vllm_eagle.metrics import stats_file
from vllm_eagle.metrics.counters import TreeMetrics
from vllm_eagle.options.devices import is_tree_mode
from vllm_eagle.serving.families import TreeCollector
from vllm_eagle.serving.summary import log_line

logger = init_logger(f"vllm.{__name__}")  # vLLM prints what loggers below its own say, and no others' INFO


@dataclass(frozen=True, slots=True)
class Load:
    """vLLM's own view of how busy the engine is."""

    running: int
    waiting: int
    kv_usage: float  # 0 to 1


class EagleStatLogger(AggregateStatLoggerBase):  # type: ignore[misc]  # vLLM is untyped here
    """Counters of draft trees for /metrics and the log; the load for the page."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]):
        self.load: Load | None = None
        self._path: Path | None = None
        self._warned = False
        self._last = TreeMetrics()
        self._last_s = time.monotonic()
        if not is_tree_mode(vllm_config.speculative_config):
            return
        parallel = vllm_config.parallel_config
        if parallel._api_process_count > 1:
            # Each has a registry of files, which shows no collectors, and a configuration of its own, which names another file.
            if parallel._api_process_rank <= 0:
                logger.warning(
                    "No vllm_eagle_ metrics in /metrics with --api-server-count %d; scrape /eagle/metrics "
                    "(VLLM_PLUGINS=eagle_trees) or use one API server.",
                    parallel._api_process_count,
                )
            return
        self._path = stats_file.path_of(vllm_config.instance_id)
        # The worker removes its file, unless it was killed.
        weakref.finalize(self, stats_file.remove, self._path)
        _replace(TreeCollector(self._look, tree_config(vllm_config), labels(vllm_config, engine_indexes[0])))

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Keep the load; called after each step."""
        if scheduler_stats is not None:
            self.load = Load(
                scheduler_stats.num_running_reqs,
                scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs,
                scheduler_stats.kv_cache_usage,
            )

    def log_engine_initialized(self) -> None:
        """Nothing to add to what vLLM says."""

    def log(self) -> None:
        """Print what happened since the last call."""
        metrics = self._look()
        if metrics is None:
            return
        now_s = time.monotonic()
        line = log_line(metrics.since(self._last), now_s - self._last_s)
        self._last, self._last_s = metrics, now_s
        if line is not None:
            logger.info("%s", line)

    def _look(self) -> TreeMetrics | None:
        if self._path is None:
            return None
        try:
            return stats_file.look(self._path)
        except (OSError, ValueError) as error:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "No vllm_eagle_ metrics: the worker's counters cannot be read (%s). They are shared through a file, so "
                    "the worker must run on this machine.",
                    error,
                )
            return None


def tree_config(vllm_config: VllmConfig) -> TreeConfig:
    """The options of an engine in tree mode."""
    options = (vllm_config.additional_config or {}).get(CONFIG_KEY, {})
    return TreeConfig.from_options(vllm_config.speculative_config.num_speculative_tokens, options)


def labels(vllm_config: VllmConfig, engine_index: int) -> dict[str, str]:
    """Labels as vLLM's own metrics have them."""
    return {"model_name": str(vllm_config.model_config.served_model_name), "engine": str(engine_index)}


def _replace(collector: TreeCollector) -> None:
    """Put a collector into vLLM's registry, in the place of an earlier engine's, as vLLM does with its own metrics."""
    for earlier in list(REGISTRY._collector_to_names):
        if isinstance(earlier, TreeCollector):
            REGISTRY.unregister(earlier)
    REGISTRY.register(collector)
