"""`vllm-eagle convert IN OUT`: write a head of any known format as vLLM, SafeAILab's EAGLE or speculators load it.

Tensors are copied bit for bit under the names of the new format. Settings keep their meaning: a config.json is written in which
the reader finds exactly the biases, norms, layers and vocabulary that the weights have. What a format cannot say is refused.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from vllm_eagle.heads import checkpoint
from vllm_eagle.heads.check import oddities
from vllm_eagle.heads.form import layer_settings, needed_tensors, vllms_form
from vllm_eagle.heads.formats import AUX_LAYERS, NORM_FLAGS, Head, read_head
from vllm_eagle.heads.judge import judge
from vllm_eagle.heads.target import EMBEDDINGS, Target

Destination = Literal["vllm", "safeailab", "speculators"]
SPECULATORS_VERSION = "0.9.0"  # whose classes load what is written here


def convert(source: Path, out: Path, to: Destination, target: Path | None, aux_layers: Sequence[int] | None) -> list[str]:
    """Convert the head in `source` to a new folder `out`; returns what the user should know.

    Raises:
        ValueError: the head is broken, does not fit the target, cannot be said in the format, or `out` is taken.
    """
    checkpoint.check_output(out)
    head = read_head(source)
    known = None if target is None else Target.read(target)
    if aux_layers is not None:
        if head.kind == "EAGLE-1":
            raise ValueError(
                f"--aux-layers: {source} is an EAGLE-1 head, which reads the target's last feature only; drop the option"
            )
        head = dataclasses.replace(head, aux_layers=tuple(aux_layers), shifted_aux_layers=False)
    found = judge(head, known)
    refusal = found.refusal()
    if refusal:
        raise ValueError(f"{source}{'' if found.wrong else f' does not fit {target}'}: {refusal}")
    notes = []
    if head.kind == "EAGLE-3" and head.aux_layers is None and known is not None:
        head = dataclasses.replace(head, aux_layers=known.default_aux_layers)
        notes.append(f"named no target layers; wrote the usual {list(known.default_aux_layers)}")
    if to == "vllm":
        config, tensors = vllms_form(head)
    else:
        config, tensors = {"safeailab": _to_safeailab, "speculators": _to_speculators}[to](head, known)
    try:
        checkpoint.write(out, config, tensors)
        checkpoint.copy_companions(source, out)
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror}); name another folder") from None
    written = dataclasses.replace(head, files=(checkpoint.WEIGHTS,))
    mended = [f"mended: {difference}" for difference in found.differences] if to == "vllm" else []
    return [*notes, *mended, *oddities(written, known)]


def _to_safeailab(head: Head, target: Target | None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    impossible = _not_in_safeailabs_code(head, target)
    if impossible:
        raise ValueError(f"{head.path}: SafeAILab's code cannot load an {head.kind} head with {impossible[0]}; use --to vllm")
    rope = dict(head.layer["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    config = {k: v for k, v in layer_settings(head).items() if k not in ("rope_parameters", "dtype")}
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": layer_settings(head)["dtype"],
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, "rope_type": kind, **rope},
    }
    if head.kind == "EAGLE-1":
        tensors = needed_tensors(head)
        if "embed_tokens.weight" not in tensors:
            embedding = None if target is None else target.tensor(EMBEDDINGS)
            if embedding is None:
                raise ValueError(
                    f"{head.path}: SafeAILab's loader wants embed_tokens, which this head leaves to the target; give --target"
                )
            tensors["embed_tokens.weight"] = embedding
        return config | {"bias": head.fc_bias, "qkv_bias": head.has_bias("qkv")}, tensors
    config |= {"draft_vocab_size": head.draft_vocab_size}
    config |= {"target_hidden_size": head.target_hidden_size} if head.target_hidden_size != head.hidden_size else {}
    config |= {} if head.aux_layers is None else {AUX_LAYERS: list(head.aux_layers)}  # for other readers
    return config, {name.replace("layers.0.", "midlayer.", 1): tensor for name, tensor in needed_tensors(head).items()}


def _not_in_safeailabs_code(head: Head, target: Target | None) -> list[str]:
    found = [flag for flag in NORM_FLAGS if head.norms[flag]]
    found += ["a bias of o_proj"] if head.has_bias("o") else []
    found += ["biases in the MLP"] if head.has_bias("mlp") else []
    found += ["sliding layers"] if head.sliding_window else []
    found += ["q_norm and k_norm"] if head.model_type == "qwen3" else []
    rope, theta = head.layer["rope_parameters"]["rope_type"], head.layer["rope_parameters"]["rope_theta"]
    if rope not in ("default", "linear", "dynamic"):
        found += [f"a rotary embedding of type {rope}"]
    elif rope != "default" and theta != 10000:  # which it takes for granted where it scales
        found += [f"a scaled rotary embedding of base {theta}"]
    if head.kind == "EAGLE-1":
        return found + (["heads narrower or wider than hidden_size"] if head.head_dim * head.num_heads != head.hidden_size else [])
    found += ["biases of q, k and v"] if head.has_bias("qkv") else []
    found += ["several layers"] if head.num_layers > 1 else []
    found += [f"{head.num_aux} target layers"] if head.num_aux != 3 else []
    found += ["the target's LM head"] if "lm_head.weight" not in head.tensors else []
    if target is not None and head.aux_layers not in (None, target.default_aux_layers):
        found += [f"target layers other than {list(target.default_aux_layers)}"]
    return found


def _to_speculators(head: Head, target: Target | None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if head.kind == "EAGLE-1":
        raise ValueError(f"{head.path}: speculators has no EAGLE-1 heads; use --to vllm or --to safeailab")
    if head.target_hidden_size != head.hidden_size:
        raise ValueError(f"{head.path}: speculators has no EAGLE-3 heads narrower or wider than their target; use --to vllm")
    layer = layer_settings(head) | {"attention_bias": head.has_bias("qkv"), "mlp_bias": head.has_bias("mlp")}
    if head.sliding_window:
        layer |= {"layer_types": ["sliding_attention"] * head.num_layers, "sliding_window": head.sliding_window}
    verifier: dict[str, Any] = {"name_or_path": None, "architectures": []}
    if target is not None:
        verifier = {"name_or_path": str(target.path.resolve()), "architectures": list(target.architectures)}
    config: dict[str, Any] = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "transformer_layer_config": layer,
        "draft_vocab_size": head.draft_vocab_size,
        "target_hidden_size": None,
        AUX_LAYERS: None if head.aux_layers is None else list(head.aux_layers),
        "dtype": layer["dtype"],
        "tie_word_embeddings": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": verifier,
        },
    }
    return config | head.norms, needed_tensors(head)
