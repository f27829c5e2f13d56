"""Counters of tree decoding, from which acceptance length and acceptance rates follow, and a record of the last trees.

All counters lie in one flat numpy record. It may be backed by a file that another process maps and reads while the worker goes on
counting (stats_file.py), so watching costs the worker nothing.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from vllm_eagle.algorithm.accept import Walk

MAX_DEPTH = 128  # vLLM allows 128 tokens per request and step
STAGES = ("draft", "verify", "accept", "compact")
# Why a request got a tree, or none, after a step.
DECISIONS = ("tree", "budget", "no_room", "switched_off", "grammar", "buffer_full", "left_behind", "failed")
Stage = Literal["draft", "verify", "accept", "compact"]
Decision = Literal["tree", "budget", "no_room", "switched_off", "grammar", "buffer_full", "left_behind", "failed"]
# Requests in a step, for the size of trees under load: bucket i holds 2**i up to 2**(i + 1) - 1 requests.
LOAD_BUCKETS = 10

COUNTS = np.dtype(
    [
        ("num_passes", "i8"),  # target passes, whatever they held
        ("num_verifications", "i8"),  # trees of one request in one target pass
        ("num_drafted", "i8"),  # nodes grown, roots left out
        ("num_verified", "i8"),  # nodes that the scheduler kept and the target scored
        ("num_accepted", "i8"),
        ("num_moved", "i8"),  # tokens whose keys and values were compacted
        ("num_drafting_errors", "i8"),
        ("speculation_off", "i8"),  # 1 once drafting has failed and is switched off
        ("num_requests", "i8"),  # in the last step
        ("trees_accepting", "i8", (MAX_DEPTH,)),  # [accepted nodes] verifications that accepted so many
        ("trees_of_size", "i8", (MAX_DEPTH,)),  # [nodes] verifications of a tree with so many nodes, root left out
        ("trees_at_load", "i8", (LOAD_BUCKETS,)),  # verifications in steps with so many requests
        ("nodes_at_load", "i8", (LOAD_BUCKETS,)),  # their nodes
        ("decisions", "i8", (len(DECISIONS),)),
        ("stage_seconds", "f8", (len(STAGES),)),
        ("stage_runs", "i8", (len(STAGES),)),
    ]
)
STATES = ("speculation_off", "num_requests")  # the rest only grows


class TreeMetrics:
    """Counts since start."""

    def __init__(self, counts: np.ndarray | None = None):
        self.counts = np.zeros((), COUNTS) if counts is None else counts

    def count_verification(self, num_nodes: int, num_accepted: int, num_requests: int) -> None:
        """Add one verification of a tree with `num_nodes` nodes (root left out) in a step with `num_requests` requests."""
        counts = self.counts
        counts["num_verifications"] += 1
        counts["num_verified"] += num_nodes
        counts["num_accepted"] += num_accepted
        counts["trees_accepting"][num_accepted] += 1
        counts["trees_of_size"][num_nodes] += 1
        load = min(num_requests.bit_length() - 1, LOAD_BUCKETS - 1)
        counts["trees_at_load"][load] += 1
        counts["nodes_at_load"][load] += num_nodes

    def add(self, name: str, amount: int = 1) -> None:
        """Add to a plain counter."""
        self.counts[name] += amount

    def count_decision(self, decision: Decision, amount: int = 1) -> None:
        """Add requests that got, or did not get, a tree."""
        self.counts["decisions"][DECISIONS.index(decision)] += amount

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Add the seconds that the block takes to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(stage, time.perf_counter() - start)

    def add_seconds(self, stage: Stage, seconds: float) -> None:
        """Add one run of a stage."""
        place = STAGES.index(stage)
        self.counts["stage_seconds"][place] += seconds
        self.counts["stage_runs"][place] += 1

    @property
    def tau(self) -> float:
        """Acceptance length: mean tokens emitted per verification, bonus token included."""
        verifications = int(self.counts["num_verifications"])
        return 1 + int(self.counts["num_accepted"]) / verifications if verifications else 1.0

    @property
    def alphas(self) -> list[float]:
        """Acceptance rate per depth, of the walks that came that far."""
        return [accepted / reached for reached, accepted in self.by_depth if accepted]

    @property
    def by_depth(self) -> list[tuple[int, int]]:
        """Per depth, from 1: the walks that came to the node above, and those that accepted a node there."""
        at_least = np.cumsum(self.counts["trees_accepting"][::-1])[::-1].tolist()  # [accepted nodes] so many or more
        return [(reached, accepted) for reached, accepted in pairwise(at_least) if reached]

    def reset(self) -> None:
        """Set all counts to zero; whether speculation is off stays."""
        off = self.counts["speculation_off"].copy()
        self.counts[...] = np.zeros((), COUNTS)
        self.counts["speculation_off"] = off

    def as_dict(self) -> dict[str, Any]:
        """Counts and rates, for JSON."""
        found: dict[str, Any] = {name: self.counts[name].tolist() for name in COUNTS.names or ()}
        for name in ("trees_accepting", "trees_of_size"):
            found[name] = _trim(found[name])
        found["decisions"] = dict(zip(DECISIONS, found["decisions"], strict=True))
        for name in ("stage_seconds", "stage_runs"):
            found[name] = dict(zip(STAGES, found[name], strict=True))
        accepted_at_depth = [accepted for _, accepted in self.by_depth if accepted]
        return found | {"accepted_at_depth": accepted_at_depth, "tau": self.tau, "alphas": self.alphas}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "TreeMetrics":
        """What `as_dict` of another process was made of."""
        metrics = cls()
        for name in COUNTS.names or ():
            value = found[name]
            if isinstance(value, Mapping):
                value = [value[key] for key in (DECISIONS if name == "decisions" else STAGES)]
            if isinstance(value, list):
                metrics.counts[name][: len(value)] = value
            else:
                metrics.counts[name] = value
        return metrics

    def since(self, before: "TreeMetrics") -> "TreeMetrics":
        """What was counted after an earlier look; if the counters were reset in between, what was counted since then."""
        growing = [name for name in COUNTS.names or () if name not in STATES]
        found = TreeMetrics(self.counts.copy())
        if all((self.counts[name] >= before.counts[name]).all() for name in growing):
            for name in growing:
                found.counts[name] -= before.counts[name]
        return found


def _trim(values: list[int]) -> list[int]:
    """Without the zeros at the end."""
    while values and not values[-1]:
        values.pop()
    return values


@dataclass(slots=True)
class TreeTrace:
    """The last verified trees with their accepted paths, and those of the next steps if somebody asks for them."""

    num_steps: int = 0  # still to be recorded
    records: list[dict[str, object]] = field(default_factory=list)
    recent: deque[tuple[str, Walk]] = field(default_factory=lambda: deque(maxlen=8))

    def record(self, req_id: str, walk: Walk) -> None:
        """Keep one verification."""
        self.recent.append((req_id, walk))
        if self.num_steps > 0:
            self.records.append(_as_dict(req_id, walk))

    def last(self) -> list[dict[str, object]]:
        """The last verified trees, newest first."""
        return [_as_dict(*entry) for entry in reversed(self.recent)]

    def start(self, num_steps: int) -> None:
        """Record the next steps from here on."""
        self.num_steps, self.records = num_steps, []

    def end_step(self) -> None:
        """Count one step down."""
        self.num_steps = max(0, self.num_steps - 1)


def _as_dict(req_id: str, walk: Walk) -> dict[str, object]:
    tree = walk.tree
    return {
        "req_id": req_id,
        "token_ids": tree.token_ids.tolist(),
        "parents": tree.parents.tolist(),
        "scores": tree.scores.tolist(),
        "path": list(walk.path),
        "emitted": list(walk.token_ids),
    }
