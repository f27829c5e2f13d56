"""Make a head for a target, start it from known weights, and write it as vLLM loads it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from vllm_eagle.heads import checkpoint
from vllm_eagle.heads.check import Target, misfits, problems
from vllm_eagle.heads.convert import needed_tensors
from vllm_eagle.heads.formats import BIASED_ARCHITECTURE, read_head
from vllm_eagle.heads.formats import Head as CheckpointHead
from vllm_eagle.train.data import Example
from vllm_eagle.train.medusa import MedusaHead, medusa_settings
from vllm_eagle.train.models import Eagle3Head, EagleHead, Head, aux_layers
from vllm_eagle.train.settings import TrainSettings
from vllm_eagle.train.target import FrozenTarget, default_aux_layers, head_config
from vllm_eagle.train.vocabulary import count_tokens, coverage, draft_vocabulary

# What transformers writes into every config and no reader of heads looks at.
_NOT_OF_A_HEAD = {
    *("_name_or_path", "id2label", "label2id", "problem_type", "output_hidden_states", "output_attentions", "return_dict"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "use_cache", "pretraining_tp", "transformers_version"),
}


def new_head(target: FrozenTarget, settings: TrainSettings, examples: Sequence[Example]) -> tuple[Head, dict[str, Any]]:
    """A head to be trained, and what the run card should say about it. `examples` choose EAGLE-3's draft vocabulary."""
    if settings.method == "eagle":
        return EagleHead(head_config(target.config), target.embed, target.lm_head), {}
    if settings.method == "medusa":
        return MedusaHead(head_config(target.config), target.embed, target.lm_head, settings.loss.num_steps), {}
    num_layers = target.config.num_hidden_layers
    layers = list(settings.aux_layers or default_aux_layers(num_layers))
    if not all(0 <= layer <= num_layers for layer in layers):
        raise ValueError(f"--aux-layers {layers}: choose numbers from 0 to {num_layers}, the target's layers")
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


def continued_head(target: FrozenTarget, settings: TrainSettings) -> tuple[Head, dict[str, Any]]:
    """The head that `--init` names, to be trained further, and what the run card should say about it.

    Raises:
        ValueError: it is of another kind than the settings ask for, or cannot be read.
    """
    path = settings.init
    assert path is not None
    head = load_head(path, target)
    kind = {EagleHead: "eagle", Eagle3Head: "eagle3", MedusaHead: "medusa"}[type(head)]
    if kind != settings.method:
        raise ValueError(f"--init {path} is a head of --method {kind}, not {settings.method}; change one of them")
    if head.max_steps is not None and head.max_steps != settings.loss.num_steps:
        raise ValueError(f"--init {path} has {head.max_steps} Medusa heads; give --unroll-steps {head.max_steps}")
    facts: dict[str, Any] = {"init": str(path)}
    if isinstance(head, Eagle3Head):
        facts |= {"aux_layers": aux_layers(head.config), "draft_vocab": head.config.draft_vocab_size}
    return head, facts


def load_head(path: Path, target: FrozenTarget) -> Head:
    """Read a head of any format that `vllm-eagle inspect` knows, or Medusa heads in vLLM's.

    Raises:
        ValueError: no such head, a broken one, another target's, or a design that the modules here do not have.
    """
    config = checkpoint.read_config(path)
    if config.get("model_type") == "medusa":
        return _load_medusa(path, config, target)
    found = read_head(path)
    known = Target(
        path=Path(target.path),
        architectures=(),
        hidden_size=target.config.hidden_size,
        vocab_size=target.config.vocab_size,
        num_layers=target.config.num_hidden_layers,
        max_positions=None,
    )
    reasons = [*problems(found), *misfits(found, known)]
    if reasons:
        raise ValueError(f"--head {path}: {reasons[0]}; `vllm-eagle inspect {path} --target {target.path}` says more")
    odd = [f"{part} biases" for part in ("o", "mlp") if found.has_bias(part)]
    odd += ["several layers"] if found.num_layers > 1 else []
    odd += ["query and key norms"] if found.model_type == "qwen3" else []
    if odd:
        raise ValueError(f"--head {path}: has {odd[0]}, which training and evaluation here do not know; measure it with `compare`")
    head = _empty_like(found, known, target)
    if "embed_tokens.weight" in found.tensors:
        head.embed_tokens = torch.nn.Embedding(found.vocab_size, found.hidden_size).requires_grad_(False)
    weights = needed_tensors(found)
    if isinstance(head, Eagle3Head):
        weights = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in weights.items()}
        weights.setdefault("lm_head.weight", target.lm_head.weight)  # a whole vocabulary may leave it to the target
    head.load_state_dict(weights)
    return head


def _load_medusa(path: Path, config: dict[str, Any], target: FrozenTarget) -> Head:
    num_heads = config.get("num_heads")
    if not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"--head {path}: its config.json names no num_heads, so these are no Medusa heads that vLLM could load")
    head = MedusaHead(head_config(target.config), target.embed, target.lm_head, num_heads)
    try:
        head.load_state_dict(load_file(path / "model.safetensors"))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--head {path}: no Medusa heads for {target.path} ({str(error).splitlines()[0]})") from None
    return head


def _empty_like(found: CheckpointHead, known: Target, target: FrozenTarget) -> Head:
    from transformers import LlamaConfig

    settings = found.layer | {
        "num_hidden_layers": 1,
        "num_key_value_heads": found.num_kv_heads,
        "head_dim": found.head_dim,
        "attention_bias": False,  # vLLM would give one to o_proj, too
        "qkv_bias": found.has_bias("qkv"),
        "tie_word_embeddings": False,
    }
    if found.kind == "EAGLE-1":
        architecture = BIASED_ARCHITECTURE if found.fc_bias else "LlamaForCausalLM"
        config = LlamaConfig(**settings | {"architectures": [architecture], "fc_bias": found.fc_bias})
        return EagleHead(config, target.embed, target.lm_head)
    eagle3: dict[str, Any] = {
        "draft_vocab_size": found.draft_vocab_size,
        "target_hidden_size": found.target_hidden_size,
        "num_aux_hidden_states": found.num_aux,  # without it vLLM's Llama class takes 3, whatever layers are named
        "eagle_aux_hidden_state_layer_ids": list(found.aux_layers or known.default_aux_layers),
    }
    eagle3 |= found.norms | {"architectures": ["LlamaForCausalLMEagle3"]}
    return Eagle3Head(LlamaConfig(**settings | eagle3), target.embed)


def save_head(head: Head, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json and model.safetensors; embedding and, in EAGLE-1, LM head stay the target's."""
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(head, MedusaHead):
        settings = medusa_settings(head.config, len(head.blocks), str(dtype).removeprefix("torch."))
    else:
        settings = {k: v for k, v in head.config.to_dict().items() if k not in _NOT_OF_A_HEAD}
        settings |= {"dtype": str(dtype).removeprefix("torch.")}
    weights = {
        name: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in head.state_dict().items()
    }
    (out / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))  # save_file makes it private
    (out / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
