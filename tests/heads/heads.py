"""Heads as other projects write them, with random weights: SafeAILab's EAGLE-1 and EAGLE-3, SpecForge's, speculators'."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.models import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCAB, llama_settings

DRAFT_VOCAB = 256
Weights = dict[str, torch.Tensor]


def _random(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)


def _layer(generator: torch.Generator, prefix: str, width: int, dtype: torch.dtype) -> Weights:
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, width),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, width),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, width),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
        "post_attention_layernorm": (HIDDEN,),
    }
    return {f"{prefix}{name}.weight": _random(generator, *shape, dtype=dtype) for name, shape in shapes.items()}


def eagle1_weights(dtype: torch.dtype = torch.float16, *, fc_bias: bool = True, qkv_bias: bool = False) -> Weights:
    """As SafeAILab's: an embedding of its own, no input norm in the first layer, no LM head."""
    generator = torch.Generator().manual_seed(3)
    weights = _layer(generator, "layers.0.", HIDDEN, dtype) | {
        "embed_tokens.weight": _random(generator, VOCAB, HIDDEN, dtype=dtype),
        "fc.weight": _random(generator, HIDDEN, 2 * HIDDEN, dtype=dtype),
    }
    if fc_bias:
        weights["fc.bias"] = _random(generator, HIDDEN, dtype=dtype)
    for name, size in (("q", HEADS * HEAD_DIM), ("k", KV_HEADS * HEAD_DIM), ("v", KV_HEADS * HEAD_DIM)):
        if qkv_bias:
            weights[f"layers.0.self_attn.{name}_proj.bias"] = _random(generator, size, dtype=dtype)
    return weights


def eagle1_settings(**changes: object) -> dict[str, object]:
    """As SafeAILab's for LLaMA-2: nothing says that there is an fc.bias. Settings that are None are left out."""
    settings: dict[str, object] = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16", "hidden_act": "silu"},
        **{"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": 1, "rms_norm_eps": 1e-5},
        **{"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 1024, "pad_token_id": 0},
        **{"bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False, "rope_scaling": None},
    }
    return {key: value for key, value in (settings | changes).items() if value is not None or key == "rope_scaling"}


def eagle3_weights(prefix: str = "midlayer.", dtype: torch.dtype = torch.bfloat16, num_aux: int = 3) -> Weights:
    """As SafeAILab's and SpecForge's: a draft vocabulary of every second token."""
    generator = torch.Generator().manual_seed(4)
    weights = _layer(generator, prefix, 2 * HIDDEN, dtype)
    weights |= {f"{prefix}{name}.weight": _random(generator, HIDDEN, dtype=dtype) for name in ("hidden_norm", "input_layernorm")}
    return weights | {
        "fc.weight": _random(generator, HIDDEN, num_aux * HIDDEN, dtype=dtype),
        "norm.weight": _random(generator, HIDDEN, dtype=dtype),
        "lm_head.weight": _random(generator, DRAFT_VOCAB, HIDDEN, dtype=dtype),
        "d2t": torch.arange(DRAFT_VOCAB),
        "t2d": torch.arange(VOCAB) % 2 == 0,
    }


def eagle3_settings(**changes: object) -> dict[str, object]:
    """As SafeAILab's."""
    return llama_settings(num_hidden_layers=1, draft_vocab_size=DRAFT_VOCAB, rope_theta=500000.0, dtype="bfloat16") | changes


def specforge_settings(aux_layers: list[int] | None, **changes: object) -> dict[str, object]:
    """As SpecForge's; it counts target layers from 0."""
    nested = {} if aux_layers is None else {"eagle_config": {"eagle_aux_hidden_state_layer_ids": aux_layers}}
    return eagle3_settings(architectures=["LlamaForCausalLMEagle3"]) | nested | changes


def speculators_settings(**changes: object) -> dict[str, object]:
    """As speculators 0.9 writes it."""
    layer = {
        key: value for key, value in eagle3_settings().items() if key not in ("architectures", "draft_vocab_size", "rope_theta")
    }
    return {
        "architectures": ["Eagle3DraftModel"],
        "auto_map": {"": "config.Eagle3SpeculatorConfig"},
        "draft_vocab_size": DRAFT_VOCAB,
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
        "fc_norm": False,
        "norm_before_fc": False,
        "norm_before_residual": True,
        "norm_output": True,
        "speculators_config": {"algorithm": "eagle3"},
        "speculators_model_type": "eagle3",
        "target_hidden_size": None,
        "transformer_layer_config": layer | {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
    } | changes


def write(folder: Path, settings: dict[str, object], weights: Weights, *, pickled: bool = False, shards: int = 1) -> Path:
    """Write config.json and weights as one file or several, of either kind."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    names = sorted(weights)
    files = {}
    for i in range(shards):
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}"
        part = {name: weights[name] for name in names[i::shards]}
        files |= dict.fromkeys(part, file)
        if pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
    if shards > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder
