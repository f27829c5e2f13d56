"""What `vllm-eagle train` can be told, checked before anything is loaded."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_eagle.heads.formats import in_vllms_order
from vllm_eagle.train.head.objective import LossWeights

Method = Literal["eagle", "eagle3", "medusa"]

# EAGLE-1's authors regress features and add noise; EAGLE-3's drop both and unroll instead; Medusa's heads are all trained at once.
DEFAULT_WEIGHTS: dict[str, LossWeights] = {
    "eagle": LossWeights(),
    "eagle3": LossWeights(regression=0.0, classification=1.0, noise=0.0, num_steps=7),
    "medusa": LossWeights(regression=0.0, classification=1.0, noise=0.0, num_steps=5),
}


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Options of one training run.

    Attributes:
        target: folder (or hub name) of the target.
        data: files of dialogues or text; empty where the target is yet to write them (whole.py).
        out: folder for head, checkpoints, curves and run card.
        method: kind of head.
        weights: parts of the loss; None for those of the method's paper (see `loss`).
        epochs: passes over the data, unless `steps` says where to stop.
        steps: optimizer steps; None for what the epochs give.
        batch_tokens: most tokens (padding included) per forward pass and process.
        accumulate: forward passes per optimizer step.
        max_length: tokens after which a dialogue is cut; capped at the positions that the target was made for.
        lr: highest learning rate; cosine decay to a hundredth after `warmup` steps.
        draft_vocab: size of the draft vocabulary, capped at the target's; None for 32,000 in EAGLE-3, the target's in EAGLE-1.
        head_layers: decoder layers of an EAGLE head.
        aux_layers: EAGLE-3's target layers, low to high; None for the authors' choice.
        dtype: of the target and of the head's arithmetic; the head's weights train in float32.
        holdout: share of the examples that is kept for validation.
        init: head to start from.
        cache_dir, cache_gb: where the target's features are kept for later epochs, and how much.
        resume: go on from the newest checkpoint in `out`.
        price_per_hour: of one device, for the run card.
        chat_template_kwargs: arguments of the target's chat template.
    """

    target: str
    data: tuple[Path, ...]
    out: Path
    method: Method = "eagle"
    weights: LossWeights | None = None
    epochs: float = 10.0
    steps: int | None = None
    batch_tokens: int = 4096
    accumulate: int = 1
    max_length: int = 2048
    lr: float = 1e-4
    warmup: int = 50
    grad_clip: float = 0.5
    draft_vocab: int | None = None
    head_layers: int = 1
    aux_layers: tuple[int, ...] | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    seed: int = 0
    holdout: float = 0.01
    init: Path | None = None
    log_every: int = 20
    eval_every: int = 500
    checkpoint_every: int = 500
    cache_dir: Path | None = None
    cache_gb: float = 0.0
    resume: bool = False
    price_per_hour: float | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for the first option that cannot be."""
        positive = (
            "epochs",
            "batch_tokens",
            "accumulate",
            "max_length",
            "head_layers",
            "lr",
            "grad_clip",
            "log_every",
            "eval_every",
            "checkpoint_every",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{_flag(name)} must be positive, got {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"--steps must be positive, got {self.steps}")
        if self.draft_vocab is not None and self.draft_vocab < 1:
            raise ValueError(f"--draft-vocab must be positive, got {self.draft_vocab}")
        if self.draft_vocab is not None and self.method == "medusa":
            raise ValueError("--draft-vocab is for EAGLE heads; Medusa's draft the whole vocabulary; remove it")
        if self.head_layers > 1 and self.method == "medusa":
            raise ValueError("--head-layers is for EAGLE heads, Medusa's have no decoder layers; remove it")
        if self.warmup < 0:
            raise ValueError(f"--warmup must not be negative, got {self.warmup}")
        if not 0 <= self.holdout <= 0.5:
            raise ValueError(f"--holdout is a share of the examples, from 0 to 0.5; got {self.holdout}")
        loss = self.loss
        if loss.num_steps < 1:
            raise ValueError(f"--unroll-steps must be at least 1, got {loss.num_steps}")
        for flag, value in (("--noise", loss.noise), ("--step-decay", loss.step_decay), *_loss_parts(loss)):
            if value < 0:
                raise ValueError(f"{flag} must not be negative, got {value}")
        if not any(value for _, value in _loss_parts(loss)):
            raise ValueError("--regression-weight and --classification-weight are both 0, so nothing would be learnt; raise one")
        if self.init is not None and (self.aux_layers is not None or self.draft_vocab is not None or self.head_layers > 1):
            raise ValueError("--init brings its own --aux-layers, --draft-vocab and --head-layers; remove them")
        if self.aux_layers is not None and self.method != "eagle3":
            raise ValueError(f"--aux-layers is for --method eagle3, this is {self.method}; remove it")
        if self.aux_layers is not None and (len(self.aux_layers) != 3 or not in_vllms_order(self.aux_layers)):
            raise ValueError(
                f"--aux-layers needs three different layers in rising order, in which vLLM reads them, got {list(self.aux_layers)}"
            )
        if bool(self.cache_dir) != (self.cache_gb > 0):
            raise ValueError("--cache-dir and --cache-gb belong together; give both, or neither to compute features on the fly")

    @property
    def loss(self) -> LossWeights:
        """The weights that are used."""
        return self.weights or DEFAULT_WEIGHTS[self.method]

    def as_dict(self) -> dict[str, Any]:
        """For the run card; paths as text, parts of the loss by their flags."""
        plain = {k: [str(x) for x in v] if k == "data" else str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        del plain["weights"]
        names = {"num_steps": "unroll_steps", "regression": "regression_weight", "classification": "classification_weight"}
        return plain | {names.get(k, k): v for k, v in asdict(self.loss).items()}

    def fixed(self) -> dict[str, Any]:
        """What must not change when a run is resumed."""
        free = ("resume", "out", "log_every", "eval_every", "checkpoint_every", "price_per_hour", "cache_dir", "cache_gb")
        return {k: v for k, v in self.as_dict().items() if k not in free}


def _loss_parts(loss: LossWeights) -> tuple[tuple[str, float], ...]:
    return ("--regression-weight", loss.regression), ("--classification-weight", loss.classification)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
