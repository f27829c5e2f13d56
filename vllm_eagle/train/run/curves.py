"""Loss and accuracy over the run: metrics.jsonl, TensorBoard, and a picture."""

import json
from pathlib import Path
from typing import Any

from vllm_eagle import files


class Curves:
    """Writes what a run measures; after a resume, points beyond the resumed step are dropped."""

    def __init__(self, out: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._out = out
        self._path = out / "metrics.jsonl"
        self.points: list[dict[str, Any]] = []
        if self._path.exists():
            known = [json.loads(line) for line in self._path.read_text().splitlines() if line.endswith("}")]
            self.points = [point for point in known if point["step"] <= first_step]
        files.write_text(self._path, "".join(json.dumps(point) + "\n" for point in self.points))
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)

    def add(self, step: int, kind: str, values: dict[str, float]) -> None:
        """`kind` is "train" or "held_out"."""
        point = {"step": step, "kind": kind} | {k: round(v, 6) for k, v in values.items()}
        self.points.append(point)
        with files.writing(self._path), self._path.open("a") as file:
            file.write(json.dumps(point) + "\n")
        with files.writing(self._out / "tensorboard"):
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def draw(self) -> None:
        """Write curves.png."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
        for kind, style in (("train", {"alpha": 0.6}), ("held_out", {"marker": "o", "markersize": 3})):
            points = [p for p in self.points if p["kind"] == kind]
            steps = [p["step"] for p in points]
            if not points:
                continue
            left.plot(steps, [p["loss"] for p in points], label=kind.replace("_", " "), **style)
            for name in sorted(k for k in points[0] if k.startswith("alpha")):
                if kind == "held_out" or name == "alpha_0":
                    label = f"{name} {kind.replace('_', ' ')}"
                    right.plot(steps, [p.get(name, float("nan")) for p in points], label=label, **style)
        left.set(xlabel="step", ylabel="loss", title="Loss")
        right.set(xlabel="step", ylabel="agreement with the target", title="Draft accuracy, teacher-forced", ylim=(0, 1))
        for axes in (left, right):
            axes.grid(alpha=0.3)
            if axes.has_data():
                axes.legend(fontsize=8)
        with files.whole(self._out / "curves.png") as picture:
            figure.savefig(picture, format="png", dpi=120)
        plt.close(figure)

    def close(self) -> None:
        """Flush TensorBoard and draw."""
        self._board.close()
        self.draw()
