"""Prometheus metrics and a log line, through vLLM's entry point group `vllm.stat_logger_plugins`.

vLLM makes one logger per front end of a server. In tree mode the first of them puts our metrics where vLLM's /metrics finds its
own: a collector into its registry, or files where processes share them (multiprocess.py). Otherwise it does nothing.
"""

import os
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
from vllm_eagle.options.instances import instance_id
from vllm_eagle.serving import multiprocess
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
        self._counters: _Counters | None = None
        self._last = TreeMetrics()
        self._last_s = time.monotonic()
        # All of several API servers would say the same; ranks count from 0, and one alone has -1 or 0.
        if not is_tree_mode(vllm_config.speculative_config) or vllm_config.parallel_config._api_process_rank > 0:
            return
        path = stats_file.path_of(instance_id(vllm_config))
        # The worker removes its file, unless it was killed.
        weakref.finalize(self, stats_file.remove, path)
        self._counters = _Counters(path)
        collector = TreeCollector(self._counters, tree_config(vllm_config), labels(vllm_config, engine_indexes[0]))
        folder = os.environ.get(multiprocess.FOLDER)
        if folder is None:
            _replace(collector)
            return
        try:
            weakref.finalize(self, multiprocess.copy_to(Path(folder), collector))
        except OSError as error:
            logger.warning("No vllm_eagle_ metrics: %s=%s cannot be written (%s).", multiprocess.FOLDER, folder, error)

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
        metrics = None if self._counters is None else self._counters()
        if metrics is None:
            return
        now_s = time.monotonic()
        line = log_line(metrics.since(self._last), now_s - self._last_s)
        self._last, self._last_s = metrics, now_s
        if line is not None:
            logger.info("%s", line)


class _Counters:
    """The worker's, as they are at each call; none if they cannot be read.

    That is said once, and not after they have been read: a worker that ends takes its file along.
    """

    def __init__(self, path: Path):
        self._path = path
        self._silent = False

    def __call__(self) -> TreeMetrics | None:
        try:
            metrics = stats_file.look(self._path)
        except (OSError, ValueError) as error:
            if not self._silent:
                self._silent = True
                logger.warning(
                    "No vllm_eagle_ metrics: the worker's counters cannot be read (%s). They are shared through a file, so "
                    "the worker must run on this machine.",
                    error,
                )
            return None
        self._silent = True
        return metrics


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
