"""What the engine says about its trees, at no more than one call a second whatever the number of browsers.

Counters come from the worker's file, which costs the engine nothing. The last trees come by a call, which the engine answers
between two steps, and only if new trees were verified. Without the file, counters come by calls as well, in turn with the trees.
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.logger import init_logger

from vllm_eagle.metrics import stats_file
from vllm_eagle.metrics.counters import TreeMetrics

logger = init_logger(f"vllm.{__name__}")
CALL_EVERY_S = 1.0
WAIT_S = 0.5  # how long a page waits for an answer that may take a step; then it shows what there is


class Source:
    """Counters and trees as last seen."""

    def __init__(self, engine: EngineClient, path: Path, clock: Callable[[], float] = time.monotonic):
        self.counters: TreeMetrics | None = None
        self.trees: list[dict[str, Any]] = []
        self.trees_s: float | None = None  # when they were read
        self.problem: str | None = None  # with the last call
        self._engine = engine
        self._path = path
        self._clock = clock
        self._called_s = float("-inf")
        self._counted_by_call = False
        self._last_method = ""
        self._seen_trees = -1  # verifications when the trees were read
        self._task: asyncio.Task[None] | None = None

    def look(self) -> None:
        """Read the counters of this moment from the file, if there is one."""
        try:
            self.counters = stats_file.look(self._path)
            self._counted_by_call = False
        except (OSError, ValueError):
            self._counted_by_call = True

    @property
    def silent_s(self) -> float:
        """How long a call has been waiting for its answer."""
        return self._clock() - self._called_s if self._task is not None else 0.0

    async def update(self, trees: bool = True) -> None:
        """Bring counters, and trees if they are wanted, up to date; returns without them if the engine is busy."""
        self.look()
        method = self._next_method(trees)
        if self._task is None and method and self._clock() - self._called_s >= CALL_EVERY_S:
            self._called_s = self._clock()
            self._task = asyncio.create_task(self._call(method))
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=WAIT_S)

    def _next_method(self, trees: bool) -> str | None:
        if self._counted_by_call:
            return "eagle_recent_trees" if trees and self._last_method == "eagle_stats" else "eagle_stats"
        fresh = self.counters is not None and int(self.counters.counts["num_verifications"]) == self._seen_trees
        return None if fresh or not trees else "eagle_recent_trees"

    async def _call(self, method: str) -> None:
        self._last_method = method
        seen = -1 if self.counters is None else int(self.counters.counts["num_verifications"])
        try:
            answer = (await self._engine.collective_rpc(method))[0]  # of the first worker; all count the same
        except Exception:
            # Whatever it is, the page must say so, and a page must not take down a server.
            if self.problem is None:
                logger.warning("/eagle: the engine does not answer %s", method, exc_info=True)
            self.problem = f"The engine does not answer {method}; the server's log says why."
        else:
            self.problem = None
            if method == "eagle_stats":
                self.counters = TreeMetrics.from_dict(answer)
            else:
                self.trees, self.trees_s, self._seen_trees = answer, self._clock(), seen
        finally:
            self._task = None
