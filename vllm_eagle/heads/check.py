"""Is a head whole, does it fit a target, and what is odd about it? Every finding is one sentence without the head's name."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch

from vllm_eagle.heads.formats import ATTENTION, AUX_LAYERS, MLP, NORM_TENSORS, Head, in_vllms_order, said_of_norm
from vllm_eagle.heads.target import Target

# Rotary embeddings that transformers and vLLM both know, and what they need to be told.
_ROPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}


def expected(head: Head) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Shape of every tensor that such a head can have, and whether it must have it."""
    hidden, eagle3 = head.hidden_size, head.kind == "EAGLE-3"
    heads, kv_heads = head.num_heads * head.head_dim, head.num_kv_heads * head.head_dim
    shapes: dict[str, tuple[tuple[int, ...], bool]] = {"embed_tokens.weight": ((head.vocab_size, hidden), False)}
    for i in range(head.num_layers):
        width = 2 * hidden if eagle3 and i == 0 else hidden  # the embedding beside the feature
        for name, out, into in (
            *(("self_attn." + name, out, width) for name, out in zip(ATTENTION, (heads, kv_heads, kv_heads), strict=True)),
            ("self_attn.o_proj", hidden, heads),
            *(("mlp." + name, head.intermediate_size, hidden) for name in MLP[:2]),
            ("mlp." + MLP[2], hidden, head.intermediate_size),
        ):
            shapes[f"layers.{i}.{name}.weight"] = ((out, into), True)
            part: Literal["qkv", "o", "mlp"] = "mlp" if name.startswith("mlp") else "o" if name.endswith("o_proj") else "qkv"
            # vLLM has a part's biases in all layers or in none.
            shapes[f"layers.{i}.{name}.bias"] = ((out,), head.has_bias(part))
        norms = {"post_attention_layernorm": True, "input_layernorm": True, "hidden_norm": i == 0}
        if not eagle3:
            norms = {"post_attention_layernorm": True} | ({"input_layernorm": True} if i else {})
        shapes |= {f"layers.{i}.{name}.weight": ((hidden,), needed) for name, needed in norms.items()}
        if head.model_type == "qwen3":
            shapes |= {f"layers.{i}.self_attn.{name}.weight": ((head.head_dim,), True) for name in ("q_norm", "k_norm")}
    if not eagle3:
        shapes["lm_head.weight"] = ((head.vocab_size, hidden), False)  # if it is a copy of the target's: see lm_head_problems
        return shapes | {"fc.weight": ((hidden, 2 * hidden), True), "fc.bias": ((hidden,), head.declared_fc_bias is True)}
    reduced, features = head.draft_vocab_size != head.vocab_size, head.num_aux * head.target_hidden_size
    shapes |= {
        "fc.weight": ((hidden, features), True),
        "norm.weight": ((hidden,), True),
        "lm_head.weight": ((head.draft_vocab_size, hidden), reduced),
        "d2t": ((head.draft_vocab_size,), reduced),
        "t2d": ((head.vocab_size,), False),
    }
    if head.target_hidden_size != hidden:
        shapes["embed_tokens.weight"] = ((head.vocab_size, hidden), True)  # the target's has another width
    if head.norms["norm_before_fc"]:
        shapes["input_norm.weight"] = ((features,), True)
    if head.norms["fc_norm"]:
        shapes |= {f"fc_norm.{i}.weight": ((head.target_hidden_size,), True) for i in range(head.num_aux)}
    return shapes


def problems(head: Head) -> list[str]:
    """Why the head cannot be what it claims to be; empty if it can."""
    if any("kv_a_proj_with_mqa" in name for name in head.tensors):
        return ["layers with latent attention (MLA), which no head has here; take one whose layers are Llama's"]
    shapes = expected(head)
    found = [*_aux_problems(head), *_setting_problems(head), *_norm_problems(head)]
    found += [_unknown(head, name) for name in sorted(head.tensors.keys() - shapes.keys())]
    missing = sorted(name for name, (_, needed) in shapes.items() if needed and name not in head.tensors)
    found += [f"{_listed(missing)} missing from the weights; get the whole head"] if missing else []
    for name in sorted(head.tensors.keys() & shapes.keys()):
        tensor, shape = head.tensors[name], shapes[name][0]
        if tuple(tensor.shape) != shape:
            found.append(
                f"{name} has shape {list(tensor.shape)}, the sizes in config.json make it {list(shape)}; correct config.json"
            )
        kind = "bool" if name == "t2d" else "integer" if name == "d2t" else "floating"
        if _kind_of(tensor) != kind:
            found.append(f"{name} is {tensor.dtype}, a {kind} type is expected; only unquantized heads are handled")
        elif kind == "floating" and not all(map(math.isfinite, head.extremes(name))):
            found.append(f"{name} holds NaN or infinity; get or train the head again")
    if head.declared_fc_bias is False and head.fc_bias:
        found.append('config.json says "bias": false but there is an fc.bias; correct config.json')
    if head.model_type == "qwen3" and (head.has_bias("o") or head.has_bias("mlp")):
        found.append("biases of o_proj or the MLP beside q_norm and k_norm, which no loader of EAGLE-3 heads knows; get it again")
    elif head.kind == "EAGLE-3" and head.model_type == "llama" and head.has_bias("qkv") != head.has_bias("o"):
        found.append("biases in only one of q, k, v and o_proj, which no loader of EAGLE-3 heads knows; get it again")
    return found or _vocabulary_problems(head)


def _setting_problems(head: Head) -> list[str]:
    """What no loader can build a layer from."""
    found = []
    rope: Mapping[str, Any] = head.layer["rope_parameters"]
    kind = rope["rope_type"]
    if kind not in _ROPES:
        found.append(f"a rotary embedding of type {kind!r}; set rope_type to one of {', '.join(_ROPES)}")
    elif missing := [name for name in _ROPES[kind] if name not in rope]:
        found.append(f"a rotary embedding of type {kind} without {', '.join(missing)}; add it to config.json")
    for name, value in {"rope_theta": rope["rope_theta"], "rms_norm_eps": head.layer["rms_norm_eps"]}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            found.append(f"{name} is {value!r}, not a number above 0; correct config.json")
    positions = head.layer["max_position_embeddings"]
    if isinstance(positions, bool) or not isinstance(positions, int) or positions < 1:
        found.append(f"max_position_embeddings is {positions!r}, not a positive integer; correct config.json")
    if head.layer["hidden_act"] != "silu":
        found.append(f"hidden_act is {head.layer['hidden_act']!r}; the layers of EAGLE heads are known with silu only")
    if head.num_heads % head.num_kv_heads:
        found.append(f"num_attention_heads {head.num_heads} is no multiple of num_key_value_heads {head.num_kv_heads}; correct it")
    if head.head_dim % 2:
        found.append(f"head_dim {head.head_dim} is odd, and a rotary embedding turns pairs; correct config.json")
    return found


def _norm_problems(head: Head) -> list[str]:
    return [
        f'{name} is in the weights, but config.json says "{flag}": false; set it to true'
        for flag, name in NORM_TENSORS.items()
        if head.kind == "EAGLE-3" and name in head.tensors and said_of_norm(head.config, flag) is False
    ]


def lm_head_problems(head: Head, target: Target | None) -> list[str]:
    """Whether an LM head in an EAGLE-1 head is the target's, with which such heads draft; then nobody needs it."""
    if head.kind == "EAGLE-3" or "lm_head.weight" not in head.tensors:
        return []
    if target is None:
        return ["lm_head.weight in an EAGLE-1 head, which drafts with the target's; give --target, to see whether it is a copy"]
    own, theirs = head.tensors["lm_head.weight"], target.lm_head()
    if theirs is None:
        return [f"lm_head.weight in an EAGLE-1 head, and {target.path} has none to compare it with; drop it if it is a copy"]
    theirs = theirs[: len(own)]
    # A copy may have been rounded to the head's type, or the target to its own.
    if own.shape == theirs.shape and (torch.equal(own, theirs.to(own.dtype)) or torch.equal(own.to(theirs.dtype), theirs)):
        return []
    return [f"lm_head.weight is not {target.path}'s, with which an EAGLE-1 head drafts; get a head for this target"]


def _unknown(head: Head, name: str) -> str:
    if head.kind == "EAGLE-1" and name == "layers.0.input_layernorm.weight":
        return (
            "layers.0.input_layernorm.weight in an EAGLE-1 head, whose first layer has no input norm; the head is of another design"
        )
    return f"{name} is unknown in an {head.kind} head with these settings; get the original head"


def _aux_problems(head: Head) -> list[str]:
    fc = head.tensors.get("fc.weight")
    if head.kind == "EAGLE-1" or fc is None or fc.dim() != 2:
        return []
    width = fc.shape[1]
    if not head.num_aux or width % head.target_hidden_size:
        return [
            f"fc.weight reads {width} features, no multiple of the target's {head.target_hidden_size}; correct target_hidden_size"
        ]
    if head.aux_layers is None:
        unnamed = f"it reads {head.num_aux} layers of the target and names none; name them with --aux-layers"
        return [unnamed] if head.num_aux != 3 else []
    if len(head.aux_layers) != head.num_aux:
        return [f"{AUX_LAYERS} names {len(head.aux_layers)} layers, fc.weight reads {head.num_aux}; name as many (--aux-layers)"]
    if not in_vllms_order(head.aux_layers) or min(head.aux_layers) < 0:
        return [
            f"{AUX_LAYERS} {list(head.aux_layers)} are not different layers in rising order, in which vLLM reads them; "
            "name those of the training (--aux-layers)"
        ]
    return []


def _vocabulary_problems(head: Head) -> list[str]:
    """Whether d2t and t2d say the same; their shapes are right."""
    if "d2t" not in head.tensors:
        return ["t2d without d2t; get the whole head"] if "t2d" in head.tensors and head.draft_vocab_size != head.vocab_size else []
    targets = torch.arange(head.draft_vocab_size) + head.tensors["d2t"].long()
    if int(targets.min()) < 0 or int(targets.max()) >= head.vocab_size:
        return [f"d2t leads to tokens from {int(targets.min())} to {int(targets.max())} of a vocabulary of {head.vocab_size}"]
    if head.draft_vocab_size == head.vocab_size and bool(head.tensors["d2t"].any()):
        return ["d2t reorders a whole vocabulary, which no loader follows; get or train the head again"]
    if len(targets.unique()) != head.draft_vocab_size:
        return ["d2t leads two draft tokens to one target token; it must hold offsets, target id minus draft id"]
    mask = torch.zeros(head.vocab_size, dtype=torch.bool)
    mask[targets] = True
    if "t2d" in head.tensors and not torch.equal(mask, head.tensors["t2d"]):
        return ["t2d does not mark the tokens that d2t leads to; one of them belongs to another head"]
    return []


def misfits(head: Head, target: Target) -> list[str]:
    """Why the head cannot draft for this target; empty if its sizes fit."""
    reasons = target.problems()
    if head.target_hidden_size != target.hidden_size:
        reasons.append(f"it takes features of size {head.target_hidden_size}, the target has {target.hidden_size}")
    if head.vocab_size != target.vocab_size:
        reasons.append(f"its vocabulary has {head.vocab_size} tokens, the target's {target.vocab_size}")
    if head.kind == "EAGLE-1":
        return reasons
    layers = target.default_aux_layers if head.aux_layers is None else head.aux_layers
    if min(layers) < 0 or max(layers) > target.num_layers or len(set(layers)) < len(layers):
        whose = "would by default read" if head.aux_layers is None else "reads"
        reasons.append(f"it {whose} layers {list(layers)} of a target with {target.num_layers}; name others with --aux-layers")
    return reasons


def oddities(head: Head, target: Target | None) -> list[str]:
    """What a user should know that is not wrong."""
    odd = []
    if head.files[0].endswith(".bin"):
        odd.append(f"{head.files[0]} is a pickle; vllm-eagle convert writes safetensors")
    if head.fc_bias:
        odd.append("fc.bias needs vllm_eagle's own class in vLLM, which is there wherever vllm_eagle is installed")
    if head.kind == "EAGLE-3" and head.aux_layers is None:
        assumed = "" if target is None else f", here {target.default_aux_layers},"
        odd.append(f"names no target layers, so vLLM assumes (2, n // 2, n - 3){assumed} of n; --aux-layers writes others down")
    if head.shifted_aux_layers and head.aux_layers:
        theirs = [layer - 1 for layer in head.aux_layers]
        odd.append(
            f"names target layers {theirs} by their own index, vLLM counts their outputs {list(head.aux_layers)}; convert writes "
            "those, --aux-layers others"
        )
    positions = head.layer.get("max_position_embeddings")
    if target is not None and target.max_positions and isinstance(positions, int) and positions < target.max_positions:
        odd.append(
            f"max_position_embeddings {positions} is below the target's {target.max_positions}: beyond it vLLM's own chains stop; "
            f"trees go on, with a head that attends to the newest {positions} tokens (draft_window)"
        )
    odd += [
        f"{name} is all zeros"
        for name, tensor in head.tensors.items()
        if name not in ("d2t", "t2d") and _kind_of(tensor) == "floating" and head.extremes(name) == (0.0, 0.0)
    ]
    dtypes = {str(t.dtype).removeprefix("torch.") for name, t in head.tensors.items() if name not in ("d2t", "t2d")}
    if len(dtypes) > 1:
        odd.append(f"weights of several types: {', '.join(sorted(dtypes))}")
    return odd


def _kind_of(tensor: torch.Tensor) -> str:
    if tensor.dtype == torch.bool:
        return "bool"
    return "floating" if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64) else "integer"


def _listed(names: list[str]) -> str:
    """At most three of them."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest + (" is" if len(names) == 1 else " are")
