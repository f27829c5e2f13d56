"""Confidence against acceptance: does a node that the head gives 0.7 get accepted seven times in ten?"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vllm_eagle import files

NUM_BINS = 10


@dataclass(frozen=True, slots=True)
class Reliability:
    """Nodes in bins of equal width by confidence; nan where a bin is empty."""

    counts: list[int]
    confidence: list[float]  # mean in the bin
    acceptance: list[float]  # share accepted
    error: float  # expected calibration error: mean distance of the two, weighed by count

    def as_dict(self) -> dict[str, object]:
        """For JSON; empty bins as null."""

        def rounded(values: list[float]) -> list[float | None]:
            return [None if np.isnan(v) else round(v, 4) for v in values]

        confidence, acceptance = rounded(self.confidence), rounded(self.acceptance)
        return {"counts": self.counts, "confidence": confidence, "acceptance": acceptance, "error": round(self.error, 4)}


def reliability(confidences: list[float], accepted: list[bool]) -> Reliability:
    """Bin the nodes.

    Raises:
        ValueError: there are none.
    """
    if not confidences:
        raise ValueError("no node was drafted, so there is nothing to calibrate; give longer prompts or more of them")
    given, hits = np.asarray(confidences), np.asarray(accepted, dtype=float)
    bins = np.minimum((given * NUM_BINS).astype(int), NUM_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_BINS)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(bins, given, NUM_BINS) / counts
        acceptance = np.bincount(bins, hits, NUM_BINS) / counts
    error = float(np.nansum(np.abs(confidence - acceptance) * counts) / len(given))
    return Reliability(counts.tolist(), confidence.tolist(), acceptance.tolist(), error)


def draw(curves: dict[str, Reliability], path: Path) -> None:
    """Reliability plot: one line per tree, with how many nodes each bin holds below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(5.5, 6.5), sharex=True, layout="constrained", gridspec_kw={"height_ratios": [4, 1]}
    )
    top.plot([0, 1], [0, 1], color="grey", linewidth=1, label="honest")
    centres = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
    for i, (name, curve) in enumerate(curves.items()):
        top.plot(curve.confidence, curve.acceptance, marker="o", label=f"{name}: error {curve.error:.3f}")
        width = 0.8 / NUM_BINS / len(curves)
        bottom.bar(centres + (i - (len(curves) - 1) / 2) * width, curve.counts, width)
    top.set(ylabel="accepted", xlim=(0, 1), ylim=(0, 1), title="Nodes whose parent was accepted")
    bottom.set(xlabel="confidence of the head", ylabel="nodes", yscale="log")
    top.grid(alpha=0.3)
    top.legend(fontsize=8)
    with files.whole(path) as picture:
        figure.savefig(picture, format="png", dpi=120)
    plt.close(figure)
