"""What steps came to, told to whoever asks: counters, the last trees, seconds per stage, the budget. It arrives late (late.py)."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_eagle.algorithm.accept import Walk
from vllm_eagle.algorithm.tree import DraftTree
from vllm_eagle.engine.v2.budgeting import Budgeting
from vllm_eagle.engine.v2.late import LateReads, Mark
from vllm_eagle.metrics.counters import Stage, TreeMetrics, TreeTrace
from vllm_eagle.metrics.usefulness import Usefulness, advice

logger = init_logger(f"vllm.{__name__}")  # below "vllm", so that vLLM shows it with its own lines

_STAGES: dict[str, Stage] = {"verify": "verify", "accept": "accept", "compact": "compact", "first": "draft", "levels": "draft"}
_RECENT = 8  # trees of a step that are copied whole where nobody traces: as many as the page shows


@dataclass(slots=True)
class Step:
    """What the host knows of a step while it launches it."""

    is_first: bool  # after a pause, perhaps: requests have come
    num_reqs: int = 0
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_trees: int = 0  # that were verified
    num_caught_up: int = 0  # tokens of earlier steps that the head ran over
    depth: int = 0  # levels that were allowed
    level_rows: list[int] = field(default_factory=list)  # nodes of each level that the head ran over
    marks: list[tuple[str, Mark]] = field(default_factory=list)  # what begins there: a key of `_STAGES`, or "gap", or nothing


class Counting:
    """Of one engine. `verified` and `drafted` are called in every step that does either; nothing is waited for.

    Attributes:
        budgeting: gets all of it, too; None: there is no budget, or it is on another rank.
    """

    def __init__(self, metrics: TreeMetrics, late: LateReads, head: str, target: str, tells: bool):
        """`tells`: whether this rank writes to the log."""
        self.metrics, self.trace = metrics, TreeTrace()
        self._late, self._usefulness = late, Usefulness()
        self._advice = partial(advice, head, target) if tells else None
        self.budgeting: Budgeting | None = None
        self._last_end: Mark | None = None

    def verified(
        self,
        req_ids: Sequence[str],
        num_nodes: torch.Tensor,  # [num_reqs] int64, nodes that were scored, root included
        paths: torch.Tensor,  # [num_reqs, max_depth] int32, accepted nodes, then zeros
        emitted: torch.Tensor,  # [num_reqs, max_depth + 1] int64, then -1
        token_ids: torch.Tensor,  # [num_reqs, max_nodes] int64
        parents: torch.Tensor,  # [num_reqs, max_nodes] int64
        scores: torch.Tensor,  # [num_reqs, max_nodes] float32
    ) -> None:
        """A step has verified trees."""
        shown = len(req_ids) if self.trace.num_steps else _RECENT
        whole = (x[:shown] for x in (emitted, token_ids, parents))
        self._late.send(partial(self._count, list(req_ids)), num_nodes, paths, scores, *whole)

    def _count(
        self,
        req_ids: list[str],
        num_nodes: np.ndarray,
        paths: np.ndarray,
        scores: np.ndarray,
        emitted: np.ndarray,
        token_ids: np.ndarray,
        parents: np.ndarray,
    ) -> None:
        lengths = np.count_nonzero(paths, axis=1).tolist()
        for row, (nodes, length) in enumerate(zip(num_nodes.tolist(), lengths, strict=True)):
            if nodes == 1:
                continue
            self.metrics.count_verification(nodes - 1, length, len(req_ids))
            tau = self._usefulness.add(nodes - 1, length)
            if tau is not None and self._advice is not None:
                logger.warning("%s", self._advice(tau))
            if row < len(token_ids):
                tree = DraftTree(token_ids[row, :nodes], parents[row, :nodes], scores[row, :nodes])
                self.trace.record(req_ids[row], Walk(tree, paths[row, :length].tolist(), emitted[row, : length + 1].tolist()))
        if self.budgeting is not None:
            self.budgeting.verified(num_nodes, paths, scores)
        self.trace.end_step()
        self.metrics.add("num_moved", int(np.count_nonzero(paths > np.arange(1, paths.shape[1] + 1))))

    def drafted(
        self,
        depth: int,
        wanted: np.ndarray,  # [num_reqs] bool, not those amid prompts
        num_nodes: torch.Tensor,  # [num_reqs] int64
        scores: torch.Tensor,  # [num_reqs, max_nodes], as the others
        depths: torch.Tensor,
        parents: torch.Tensor,
    ) -> None:
        """A step has drafted these trees, of at most so many levels."""
        self._late.send(partial(self._add_drafted, depth, wanted), num_nodes, scores, depths, parents)

    def _add_drafted(self, depth: int, wanted: np.ndarray, *trees: np.ndarray) -> None:
        num_nodes, scores, depths, parents = (values[wanted] for values in trees)
        self.metrics.add("num_drafted", int((num_nodes - 1).sum()))
        if self.budgeting is not None and len(num_nodes):
            self.budgeting.drafted(depth, num_nodes, scores, depths, parents)

    def step(self, step: Step) -> None:
        """A step has been launched, to its end."""
        end = self._late.mark()
        self.metrics.add("num_passes")
        self.metrics.counts["num_requests"] = step.num_reqs
        marks = [*([] if self._last_end is None else [("gap", self._last_end)]), *step.marks, ("", end)]
        self._last_end = end
        self._late.send(partial(self._add_step, step, [name for name, _ in marks]), marks=[mark for _, mark in marks])

    def _add_step(self, step: Step, names: Sequence[str], seconds: Sequence[float]) -> None:
        spent: dict[str, float] = defaultdict(float)
        for name, each in zip(names, seconds, strict=False):
            spent[name] += each
        by_stage: dict[Stage, float] = defaultdict(float)
        for name, stage in _STAGES.items():
            by_stage[stage] += spent[name]
        for stage, each in by_stage.items():
            self.metrics.add_seconds(stage, each)
        if self.budgeting is not None:
            gap_s = spent["gap"] if "gap" in spent and not step.is_first else None
            pass_s = spent["verify"] + spent["accept"] + spent["compact"]
            self.budgeting.passed(gap_s, pass_s, step.num_tokens, step.num_prompt_tokens, step.num_trees)
            if step.depth:
                rows, committed = step.level_rows, step.num_tokens + step.num_caught_up
                self.budgeting.spent(spent["first"], committed, spent["levels"], step.num_reqs, rows, step.depth)
