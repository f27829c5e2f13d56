"""What the page shows, put together from counters, trees and vLLM's own figures."""

import asyncio
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm.engine.protocol import EngineClient

from vllm_eagle.metrics import stats_file
from vllm_eagle.metrics.counters import TreeMetrics
from vllm_eagle.options.devices import is_tree_mode
from vllm_eagle.options.instances import instance_id
from vllm_eagle.serving.families import TreeCollector
from vllm_eagle.serving.history import KEPT_S, History
from vllm_eagle.serving.source import Source
from vllm_eagle.serving.stat_logger import EagleStatLogger, Load, labels, tree_config
from vllm_eagle.serving.summary import verdict, window
from vllm_eagle.serving.trees import TreeView, token_text

SAMPLE_EVERY_S = 1.0
CHART_STEP_S = 5.0


class Feed:
    """One server's data."""

    def __init__(self, engine: EngineClient):
        self._engine = engine
        self._vllm_config = engine.vllm_config
        self._history = History()
        self._sampled: TreeMetrics | None = None
        self._started_s = time.monotonic()
        self._source: Source | None = None
        if not is_tree_mode(self._vllm_config.speculative_config):
            return
        self._config = tree_config(self._vllm_config)
        self._source = Source(engine, stats_file.path_of(instance_id(self._vllm_config)))
        self._view = TreeView(token_text(engine.get_tokenizer()) if self._config.show_text else None)

    @property
    def dead(self) -> bool:
        """Whether the engine has ended."""
        return bool(self._engine.errored)

    async def sample(self) -> None:
        """Follow the counters, whoever looks, so that a page shows the last minutes when it is opened."""
        while self._source is not None:
            self._source.look()
            self._add_sample(self._source.counters)
            await asyncio.sleep(SAMPLE_EVERY_S)

    def _add_sample(self, metrics: TreeMetrics | None) -> None:
        """Add counters that were read since the last sample: old ones would say that nothing happened since."""
        if metrics is not None and metrics is not self._sampled:
            self._sampled = metrics
            self._history.add(time.monotonic(), metrics)

    async def collector(self) -> TreeCollector | None:
        """For Prometheus; none in a server without trees."""
        if self._source is None:
            return None
        await self._source.update(trees=False)
        metrics = self._source.counters
        return TreeCollector(lambda: metrics, self._config, labels(self._vllm_config, 0))

    async def data(self) -> dict[str, Any]:
        """All that the page shows, for JSON."""
        found: dict[str, Any] = {
            "trees": self._source is not None,
            "model": str(self._vllm_config.model_config.served_model_name),
            "versions": {"vLLM": version("vllm"), "vllm_eagle": version("vllm-eagle")},
            "up_s": round(time.monotonic() - self._started_s),
            "load": self._load(),
        }
        if self._source is not None:
            await self._source.update()
            self._add_sample(self._source.counters)
            found |= self._tree_data(self._source)
        return found

    def _tree_data(self, source: Source) -> dict[str, Any]:
        config = self._config
        total = source.counters or TreeMetrics()
        minute, seconds = self._history.last(60)
        level, text = verdict(minute, total)
        now_s = time.monotonic()
        return {
            "counted": source.counters is not None,
            "head": Path(self._vllm_config.speculative_config.model).name,
            "options": {
                "mode": config.mode,
                "num_draft_tokens": config.num_draft_tokens,
                "topk": config.topk,
                "max_depth": config.max_depth,
                "coupled": config.coupled,
                "show_text": config.show_text,
            },
            "level": level,
            "verdict": text,
            "speculation_off": bool(total.counts["speculation_off"]),
            "minute": window(minute, seconds, config.depth_limit),
            "total": window(total, None, config.depth_limit),
            "chart": {"seconds": KEPT_S, "taus": self._history.taus(now_s, CHART_STEP_S)},
            "recent": self._view(source.trees),
            "recent_age_s": None if source.trees_s is None else round(now_s - source.trees_s, 1),
            "silent_s": round(source.silent_s, 1),
            "problem": source.problem,
        }

    def _load(self) -> dict[str, float] | None:
        """vLLM's running and waiting requests and cache use, as it told our stat logger."""
        manager = getattr(self._engine, "logger_manager", None)
        loggers = [] if manager is None else [x for x in manager.stat_loggers if isinstance(x, EagleStatLogger)]
        load: Load | None = loggers[0].load if loggers else None
        return None if load is None else {"running": load.running, "waiting": load.waiting, "kv_usage": load.kv_usage}
