"""Make a head for a target, start it from known weights, and write it as vLLM loads it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_eagle.train.data import Example
from vllm_eagle.train.medusa import MedusaHead, medusa_settings
from vllm_eagle.train.models import Eagle3Head, EagleHead, Head, aux_layers
from vllm_eagle.train.settings import TrainSettings
from vllm_eagle.train.target import FrozenTarget, default_aux_layers, head_config
from vllm_eagle.train.vocabulary import count_tokens, coverage, draft_vocabulary


def new_head(target: FrozenTarget, settings: TrainSettings, examples: Sequence[Example]) -> tuple[Head, dict[str, Any]]:
    """A head to be trained, and what the run card should say about it. `examples` choose EAGLE-3's draft vocabulary."""
    if settings.method == "eagle":
        return EagleHead(head_config(target.config), target.embed, target.lm_head), {}
    if settings.method == "medusa":
        return MedusaHead(head_config(target.config), target.embed, target.lm_head, settings.weights.num_steps), {}
    num_layers = target.config.num_hidden_layers
    layers = list(settings.aux_layers or default_aux_layers(num_layers))
    if len(set(layers)) != 3 or not all(0 <= layer <= num_layers for layer in layers):
        raise ValueError(f"--aux-layers {layers}: choose three different numbers from 0 to {num_layers}, the target's layers")
    size = min(settings.draft_vocab, target.config.vocab_size)
    head = Eagle3Head(head_config(target.config, size, layers), target.embed)
    counts = count_tokens(((e.token_ids, e.loss_mask) for e in examples), target.config.vocab_size)
    d2t, t2d = draft_vocabulary(counts, size)
    if head.target_ids is not None:
        head.d2t.copy_(d2t)
        head.t2d.copy_(t2d)
    # The target's own LM head and final norm are the best guess at what turns a feature into these tokens.
    chosen = t2d.nonzero()[:, 0]
    head.lm_head.weight.data.copy_(target.lm_head.weight.data[chosen])
    head.norm.weight.data.copy_(target.decoder.norm.weight.data)
    return head, {"aux_layers": layers, "draft_vocab": size, "draft_vocab_coverage": round(coverage(counts, t2d), 5)}


def load_head(path: Path, target: FrozenTarget) -> Head:
    """Read a head in vLLM's format.

    Raises:
        ValueError: no such head, weights that do not fit its config, a kind of head that is not known here, another target's.
    """
    from transformers import LlamaConfig

    try:
        settings = json.loads((path / "config.json").read_text())
        weights = load_file(path / "model.safetensors")
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--head {path}: {error}; a head is a folder with config.json and model.safetensors "
                         "(vllm-eagle convert makes one of other formats)") from None  # fmt: skip
    head: Head
    if settings.get("model_type") == "medusa":
        head = MedusaHead(head_config(target.config), target.embed, target.lm_head, settings["num_heads"])
    else:
        weights = {
            name.replace("layers.0.", "midlayer.") if "hidden_norm" in "".join(weights) else name: w for name, w in weights.items()
        }
        odd = [key for key in ("norm_before_fc", "fc_norm", "norm_output") if settings.get(key)]
        if odd:
            raise ValueError(
                f"--head {path}: {', '.join(odd)} is set, which evaluation does not know; measure this head with `compare`"
            )
        config = LlamaConfig(**{k: v for k, v in settings.items() if k != "model_type"})
        if (config.vocab_size, getattr(config, "target_hidden_size", None) or config.hidden_size) != (
            target.config.vocab_size,
            target.config.hidden_size,
        ):
            raise ValueError(
                f"--head {path}: vocabulary {config.vocab_size} and hidden size {config.hidden_size} are not those of "
                f"{target.path} ({target.config.vocab_size}, {target.config.hidden_size}); use a head trained for this target"
            )
        is_eagle3 = "midlayer.hidden_norm.weight" in weights
        if is_eagle3:
            _complete_eagle3(config, weights, target)
            head = Eagle3Head(config, target.embed)
        else:
            config.fc_bias = "fc.bias" in weights
            config.attention_bias = "layers.0.self_attn.q_proj.bias" in weights
            head = EagleHead(config, target.embed, target.lm_head)
        own = weights.get("embed_tokens.weight")
        if own is not None:
            head.embed_tokens = torch.nn.Embedding(*own.shape)
    missing, unexpected = head.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise ValueError(
            f"--head {path}: weights missing {sorted(missing)} and unknown {sorted(unexpected)}; see `vllm-eagle inspect {path}`"
        )
    return head


def _complete_eagle3(config: Any, weights: dict[str, torch.Tensor], target: FrozenTarget) -> None:
    """Fields that an EAGLE-3 config may leave to its weights."""
    if getattr(config, "draft_vocab_size", None) is None:
        config.draft_vocab_size = weights["lm_head.weight"].shape[0]
    if not aux_layers(config):
        config.eagle_aux_hidden_state_layer_ids = default_aux_layers(target.config.num_hidden_layers)
    if "d2t" in weights and "t2d" not in weights:
        ids = torch.arange(len(weights["d2t"])) + weights["d2t"]
        weights["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)


def save_head(head: Head, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json and model.safetensors; embedding and, in EAGLE-1, LM head stay the target's."""
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(head, MedusaHead):
        settings = medusa_settings(head.config, len(head.blocks))
    else:
        settings = head.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    weights = {
        name: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in head.state_dict().items()
        if not name.startswith("rotary.")
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
