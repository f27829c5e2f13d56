"""The worker's counters as Prometheus metrics.

The prefix is `vllm_eagle_`: `vllm:` is vLLM's own, which drops and renames what carries it between versions, and Prometheus keeps
colons for recording rules. Every sample is a cell that only grows, or a sum of such cells, so a scrape in the middle of an update
never makes a counter fall, which Prometheus would take for a restart.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.metrics.counters import DECISIONS, LOAD_BUCKETS, STAGES, TreeMetrics

PREFIX = "vllm_eagle_"
# Fields of COUNTS that are one number: metric without prefix and `_total`, help.
PLAIN = {
    "num_passes": ("target_passes", "Target passes, with and without trees."),
    "num_drafted": ("nodes_drafted", "Nodes that the head drafted, roots left out."),
    "num_verified": ("nodes_verified", "Drafted nodes that the scheduler kept and the target scored."),
    "num_accepted": ("nodes_accepted", "Drafted nodes that were emitted."),
    "num_moved": ("tokens_moved", "Tokens whose keys and values were moved to the slots of their positions."),
    "num_drafting_errors": ("drafting_errors", "Exceptions in drafting; the first one switches speculation off."),
}
_ACCEPTED_BOUNDS = (*range(17), 24, 32, 48, 64, 96)
_SIZE_BOUNDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)


class TreeCollector(Collector):
    """Metrics made at each scrape."""

    def __init__(self, look: Callable[[], TreeMetrics | None], config: TreeConfig, labels: Mapping[str, str]):
        self._look = look
        self._config = config
        self._labels = labels

    def describe(self) -> Iterator[Metric]:
        """Names for the registry, before there is anything to count."""
        return families(TreeMetrics(), self._config, self._labels)

    def collect(self) -> Iterator[Metric]:
        """Counters of this moment; nothing if they cannot be read."""
        metrics = self._look()
        return iter(()) if metrics is None else families(metrics, self._config, self._labels)


def families(metrics: TreeMetrics, config: TreeConfig, labels: Mapping[str, str]) -> Iterator[Metric]:
    """All metrics, each sample with `labels`."""
    counts = metrics.counts
    names, values = list(labels), list(labels.values())

    def counter(name: str, text: str, label: str | None = None) -> CounterMetricFamily:
        return CounterMetricFamily(PREFIX + name, text, labels=[*names, label] if label else names)

    for field, (name, text) in PLAIN.items():
        family = counter(name, text)
        family.add_metric(values, int(counts[field]))
        yield family

    yield _histogram(
        "accepted_tokens",
        "Drafted tokens accepted per verified tree, bonus token left out: tau is 1 + sum / count.",
        counts["trees_accepting"],
        _up_to(_ACCEPTED_BOUNDS, config.depth_limit),
        labels,
    )
    yield _histogram(
        "tree_nodes",
        "Nodes per verified tree, root left out.",
        counts["trees_of_size"],
        _up_to(_SIZE_BOUNDS, config.num_draft_tokens),
        labels,
    )

    reached = counter("depth_reached", "Walks that came to the node above this depth.", "depth")
    accepted = counter("depth_accepted", "Walks that accepted a node of this depth.", "depth")
    at_least = np.cumsum(counts["trees_accepting"][::-1])[::-1].tolist()
    for depth in range(1, config.depth_limit + 1):
        reached.add_metric([*values, str(depth)], at_least[depth - 1])
        accepted.add_metric([*values, str(depth)], at_least[depth])
    yield reached
    yield accepted

    seconds = counter("stage_seconds", "Seconds spent in a stage of the step.", "stage")
    runs = counter("stage_runs", "Runs of a stage of the step.", "stage")
    for stage, stage_seconds, stage_runs in zip(STAGES, counts["stage_seconds"], counts["stage_runs"], strict=True):
        seconds.add_metric([*values, stage], float(stage_seconds))
        runs.add_metric([*values, stage], int(stage_runs))
    yield seconds
    yield runs

    decisions = counter("decisions", "Requests that got a tree for the next step, or why they got none.", "decision")
    for decision, number in zip(DECISIONS, counts["decisions"].tolist(), strict=True):
        decisions.add_metric([*values, decision], number)
    yield decisions

    trees = counter("load_trees", "Verified trees by the number of requests in the step.", "requests")
    nodes = counter("load_nodes", "Nodes of verified trees by the number of requests in the step.", "requests")
    for bucket in range(LOAD_BUCKETS):
        trees.add_metric([*values, load_label(bucket)], int(counts["trees_at_load"][bucket]))
        nodes.add_metric([*values, load_label(bucket)], int(counts["nodes_at_load"][bucket]))
    yield trees
    yield nodes

    off = GaugeMetricFamily(PREFIX + "speculation_off", "1 once drafting has failed and is switched off.", labels=names)
    off.add_metric(values, int(counts["speculation_off"]))
    yield off


def load_label(bucket: int) -> str:
    """Numbers of requests that a bucket of `trees_at_load` holds."""
    low, high = 2**bucket, 2 ** (bucket + 1) - 1
    if bucket == LOAD_BUCKETS - 1:
        return f"{low}+"
    return str(low) if low == high else f"{low}-{high}"


def _up_to(bounds: Sequence[int], most: int) -> list[int]:
    return [*(bound for bound in bounds if bound < most), most]


def _histogram(name: str, text: str, cells: np.ndarray, bounds: Sequence[int], labels: Mapping[str, str]) -> HistogramMetricFamily:
    """`cells[value]` observations of each value, as cumulative buckets."""
    below = np.cumsum(cells)
    buckets: list[tuple[str, float]] = [(floatToGoString(bound), int(below[bound])) for bound in bounds]
    buckets.append(("+Inf", int(below[-1])))
    family = HistogramMetricFamily(PREFIX + name, text, labels=list(labels))
    family.add_metric(list(labels.values()), buckets, int((cells * np.arange(len(cells))).sum()))
    return family
