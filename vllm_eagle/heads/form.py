"""The form in which vLLM builds and fills exactly the head that was read: what `vllm-eagle convert` writes by default."""

from typing import Any

import torch

from vllm_eagle.heads.formats import AUX_LAYERS, BIASED_ARCHITECTURE, Head


def layer_settings(head: Head) -> dict[str, Any]:
    """Settings of the layer, biases apart. The type is that of `fc`; vLLM runs a head in the target's all the same."""
    return head.layer | {
        "model_type": head.model_type,
        "dtype": str(head.tensors["fc.weight"].dtype).removeprefix("torch."),
        "hidden_size": head.hidden_size,
        "vocab_size": head.vocab_size,
        "num_hidden_layers": head.num_layers,
        "num_attention_heads": head.num_heads,
        "num_key_value_heads": head.num_kv_heads,
        "head_dim": head.head_dim,
        "intermediate_size": head.intermediate_size,
    }


def needed_tensors(head: Head) -> dict[str, torch.Tensor]:
    """The tensors, without an EAGLE-1 head's copy of the target's LM head, and without d2t and t2d where the vocabulary is whole.

    Where it is not, a missing t2d is made from d2t.
    """
    if head.kind == "EAGLE-1":
        return {name: tensor for name, tensor in head.tensors.items() if name != "lm_head.weight"}
    tensors = dict(head.tensors)
    if head.draft_vocab_size == head.vocab_size:
        return {name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
    if "t2d" not in tensors:
        tensors["t2d"] = torch.zeros(head.vocab_size, dtype=torch.bool)
        tensors["t2d"][torch.arange(head.draft_vocab_size) + tensors["d2t"].long()] = True
    return tensors


def vllms_form(head: Head) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """config.json and tensors with which vLLM builds and fills exactly this head; it has no problems (check.py)."""
    config = layer_settings(head) | {"mlp_bias": head.has_bias("mlp")}
    if head.kind == "EAGLE-1":
        architecture = BIASED_ARCHITECTURE if head.fc_bias else "EagleLlamaForCausalLM"
        # vLLM takes o_proj's bias from the one and those of q, k, v from the other.
        config |= {"architectures": [architecture], "attention_bias": head.has_bias("o"), "qkv_bias": head.has_bias("qkv")}
        return config, needed_tensors(head)
    config |= {
        "architectures": [{"llama": "Eagle3LlamaForCausalLM", "qwen3": "Eagle3Qwen3ForCausalLM"}[head.model_type]],
        "attention_bias": head.has_bias("qkv"),
        "draft_vocab_size": head.draft_vocab_size,
        "num_aux_hidden_states": head.num_aux,  # without it vLLM's Llama class takes 3, whatever layers are named
        **head.norms,
    }
    config |= {"target_hidden_size": head.target_hidden_size} if head.target_hidden_size != head.hidden_size else {}
    config |= {} if head.aux_layers is None else {AUX_LAYERS: list(head.aux_layers)}
    return config, needed_tensors(head)
