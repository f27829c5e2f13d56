"""Heads between files and torch modules: read from any format that `vllm-eagle inspect` knows, write as vLLM loads it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from vllm_eagle import files
from vllm_eagle.heads import checkpoint, draft_vocab
from vllm_eagle.heads.form import needed_tensors
from vllm_eagle.heads.formats import BIASED_ARCHITECTURE, UNUSED, read_head
from vllm_eagle.heads.formats import Head as CheckpointHead
from vllm_eagle.heads.judge import judge
from vllm_eagle.heads.target import Target
from vllm_eagle.train.features.target import FrozenTarget, head_config
from vllm_eagle.train.head.medusa import MedusaHead, medusa_settings
from vllm_eagle.train.head.models import Eagle3Head, EagleHead, Head

# What transformers writes into every config and no reader of heads looks at.
_NOT_OF_A_HEAD = {
    *("_name_or_path", "id2label", "label2id", "problem_type", "output_hidden_states", "output_attentions", "return_dict"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "use_cache", "pretraining_tp", "transformers_version"),
}


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
    refusal = judge(found, known).refusal()
    if refusal:
        raise ValueError(f"--head {path}: {refusal}; `vllm-eagle inspect {path} --target {target.path}` says more")
    head = _empty_like(found, known, target)
    if "embed_tokens.weight" in found.tensors:
        head.embed_tokens = torch.nn.Embedding(found.vocab_size, found.hidden_size).requires_grad_(False)
    weights = needed_tensors(found)
    if isinstance(head, Eagle3Head):
        weights = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in weights.items() if not UNUSED.fullmatch(name)}
        weights.setdefault("lm_head.weight", target.lm_head.weight)  # a whole vocabulary may leave it to the target
    head.load_state_dict(weights)
    if isinstance(head, EagleHead):
        ids = draft_vocab.read(path, target.config.vocab_size)
        if ids is not None:
            head.limit_to(torch.tensor(ids))
    return head


def _load_medusa(path: Path, config: dict[str, Any], target: FrozenTarget) -> Head:
    num_heads = config.get("num_heads")
    if not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"--head {path}: its config.json names no num_heads, so these are no Medusa heads that vLLM could load")
    head = MedusaHead(head_config(target.config), target.embed, target.lm_head, num_heads)
    try:
        head.load_state_dict(load_file(path / "model.safetensors"))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"--head {path}: no Medusa heads for {target.path} ({str(error).splitlines()[0]})") from None
    for name, tensor in head.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"--head {path}: {name} holds NaN or infinity; train it again")
    return head


def _empty_like(found: CheckpointHead, known: Target, target: FrozenTarget) -> Head:
    from transformers import LlamaConfig

    settings = found.layer | {
        "num_hidden_layers": found.num_layers,
        "num_key_value_heads": found.num_kv_heads,
        "head_dim": found.head_dim,
        "mlp_bias": found.has_bias("mlp"),
        "tie_word_embeddings": False,
    }
    if found.kind == "EAGLE-1":
        architecture = BIASED_ARCHITECTURE if found.fc_bias else "LlamaForCausalLM"
        settings |= {"attention_bias": found.has_bias("o"), "qkv_bias": found.has_bias("qkv")}
        config = LlamaConfig(**settings | {"architectures": [architecture], "fc_bias": found.fc_bias})
        return EagleHead(config, target.embed, target.lm_head, target.finish)
    eagle3: dict[str, Any] = {
        "draft_vocab_size": found.draft_vocab_size,
        "target_hidden_size": found.target_hidden_size,
        "num_aux_hidden_states": found.num_aux,  # without it vLLM's Llama class takes 3, whatever layers are named
        "eagle_aux_hidden_state_layer_ids": list(found.aux_layers or known.default_aux_layers),
    }
    eagle3 |= found.norms | {"architectures": ["LlamaForCausalLMEagle3"], "attention_bias": found.has_bias("qkv")}
    if found.model_type == "qwen3":
        eagle3 |= {"architectures": ["Eagle3Qwen3ForCausalLM"], "qk_norm": True}
    return Eagle3Head(LlamaConfig(**settings | eagle3), target.embed)


def save_head(head: Head, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json and model.safetensors; embedding and, in EAGLE-1, LM head stay the target's."""
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(head, MedusaHead):
        settings = medusa_settings(head.config, len(head.blocks), str(dtype).removeprefix("torch."))
    else:
        settings = {k: v for k, v in head.config.to_dict().items() if k not in _NOT_OF_A_HEAD}
        settings |= {"dtype": str(dtype).removeprefix("torch.")}
        settings |= {"model_type": "qwen3"} if settings.pop("qk_norm", False) else {}  # whose layers have such norms
    weights = {
        name: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in head.state_dict().items()
    }
    if isinstance(head, EagleHead) and head.target_ids is not None:
        draft_vocab.write(out, head.target_ids.tolist(), head.config.vocab_size)
    with files.whole(out / "config.json") as config_file, files.whole(out / "model.safetensors") as weights_file:
        config_file.write_text(json.dumps(settings, indent=1) + "\n")
        weights_file.write_bytes(save(weights, metadata={"format": "pt"}))  # save_file makes it private
