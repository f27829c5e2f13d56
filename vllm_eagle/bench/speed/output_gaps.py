"""Tokens so far, and the time between the outputs of a request, as an engine's own statistics have it.

A draft tree's tokens come in groups, one per target pass, so a stream waits between outputs, not between tokens. vLLM measures each
gap anyway; to ask it for an output per step instead would cost time in every step, and most where there are most of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

if TYPE_CHECKING:
    from vllm import LLM


class OutputGaps(AggregateStatLoggerBase):  # type: ignore[misc]  # vLLM is untyped here
    """Keeps what the engine reports after each step."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.seconds: list[float] = []  # between outputs of each request, step after step

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """One step; the first output of a request has none before it, and so no gap."""
        if iteration_stats is not None:
            self.num_tokens += iteration_stats.num_generation_tokens
            self.seconds += iteration_stats.inter_token_latencies_iter

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


@contextmanager
def output_gaps(llm: "LLM") -> Iterator[OutputGaps]:
    """What the engine reports while the context lasts; it grows.

    Args:
        llm: with `disable_log_stats=False`.
    """
    loggers = llm.llm_engine.logger_manager.stat_loggers
    gaps = OutputGaps()
    loggers.append(gaps)
    try:
        yield gaps
    finally:
        loggers.remove(gaps)
