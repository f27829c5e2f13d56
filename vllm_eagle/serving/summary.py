"""Counters of some span of time as the figures that people read: the page's, and the log's line."""

from typing import Any, Literal

from vllm_eagle.metrics.counters import DECISIONS, STAGES, TreeMetrics
from vllm_eagle.serving.families import load_label

Level = Literal["good", "warn", "bad", "idle"]
# What is worth a look. Plain decoding has a tau of 1, and a tree costs more than a plain step.
POOR_TAU = 1.3
FALLEN = 0.7  # of the average since start
FEW_TREES = 20  # verifications below which a mean says little


def window(metrics: TreeMetrics, seconds: float | None, depth_limit: int) -> dict[str, Any]:
    """Figures of one span; `seconds` is its length, if known."""
    counts = metrics.counts
    passes, trees, accepted = (int(counts[name]) for name in ("num_passes", "num_verifications", "num_accepted"))
    spent = float(counts["stage_seconds"].sum())
    return {
        "seconds": seconds,
        "passes": passes,
        "trees": trees,
        "tau": metrics.tau if trees else None,
        "tokens_per_s": (trees + accepted) / seconds if seconds else None,
        "passes_per_s": passes / seconds if seconds else None,
        "nodes_per_tree": int(counts["num_verified"]) / trees if trees else None,
        "drafted": int(counts["num_drafted"]),
        "verified": int(counts["num_verified"]),
        "accepted": accepted,
        "moved": int(counts["num_moved"]),
        "depths": [{"reached": here, "accepted": there} for here, there in metrics.by_depth[:depth_limit]],
        "stages": [
            {"name": name, "share": float(value) / spent if spent else 0.0, "ms": 1e3 * float(value) / max(int(runs), 1)}
            for name, value, runs in zip(STAGES, counts["stage_seconds"], counts["stage_runs"], strict=True)
        ],
        "decisions": dict(zip(DECISIONS, counts["decisions"].tolist(), strict=True)),
        "loads": [
            {"requests": load_label(bucket), "trees": here, "nodes": nodes / here}
            for bucket, (here, nodes) in enumerate(
                zip(counts["trees_at_load"].tolist(), counts["nodes_at_load"].tolist(), strict=True)
            )
            if here
        ],
    }


def verdict(minute: TreeMetrics, total: TreeMetrics) -> tuple[Level, str]:
    """Whether speculation works, in a few words. `minute` is the last minute, `total` all since start."""
    passes, trees = int(minute.counts["num_passes"]), int(minute.counts["num_verifications"])
    if total.counts["speculation_off"]:
        return "bad", "Speculation is off"
    if not passes:
        return "idle", "Idle"
    if not trees:
        return "warn", f"No trees: {_reasons(minute)}"
    if trees < FEW_TREES:
        return "good", "Working, few trees yet"
    if minute.tau < POOR_TAU:
        return "warn", "Hardly any draft is accepted"
    if minute.tau - 1 < FALLEN * (total.tau - 1):
        return "warn", "Below its average"
    return "good", "Speculation works"


def log_line(metrics: TreeMetrics, seconds: float) -> str | None:
    """One line about the last `seconds`; none if the target did nothing."""
    counts = metrics.counts
    passes, trees = int(counts["num_passes"]), int(counts["num_verifications"])
    if not passes:
        return None
    if not trees:
        return f"Draft trees: none in {passes} target passes ({_reasons(metrics)})"
    depths = " ".join(f"{alpha:.2f}" for alpha in metrics.alphas) or "none accepted"
    shares = " ".join(
        f"{name} {100 * spent / seconds:.0f} %" for name, spent in zip(STAGES, counts["stage_seconds"].tolist(), strict=True)
    )
    nodes = int(counts["num_verified"]) / trees
    return (
        f"Draft trees: tau {metrics.tau:.2f} over {trees} trees in {passes} target passes, {nodes:.1f} nodes per tree, "
        f"acceptance by depth {depths}, {shares} of the time"
    )


def _reasons(metrics: TreeMetrics) -> str:
    if metrics.counts["speculation_off"]:
        return "speculation is off after an error in drafting"
    named = [
        f"{name} {number}"
        for name, number in zip(DECISIONS, metrics.counts["decisions"].tolist(), strict=True)
        if number and name != "tree"
    ]
    return ", ".join(named) or "only prompts, or first tokens"
