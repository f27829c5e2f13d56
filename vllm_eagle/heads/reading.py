"""Where vLLM would read a head's folder as something else than the head is: what `vllm-eagle convert` mends.

There is no list of such faults. The folder is compared with what convert would write (`form.vllms_form`): names and shapes of all
tensors, and every setting, as vLLM takes it from this config.json.
"""

from collections.abc import Mapping
from typing import Any

from vllm_eagle.heads.form import vllms_form
from vllm_eagle.heads.formats import (
    AUX_LAYERS,
    BIASED_ARCHITECTURE,
    DEFAULTS,
    NORM_FLAGS,
    Head,
    nested_settings,
    rope_parameters,
    said_of_norm,
)

_ALSO_KNOWN_AS = {"LlamaForCausalLMEagle3": "Eagle3LlamaForCausalLM"}


def differences(head: Head) -> list[str]:
    """Why vLLM cannot serve the folder as it is, a sentence each; empty if it can. For heads that are whole (check.problems)."""
    config, tensors = vllms_form(head)
    return [*_of_files(head), *_of_tensors(head, tensors), *_of_settings(head, config)]


def _of_files(head: Head) -> list[str]:
    if head.files[0].endswith(".bin"):
        return [f"{head.files[0]} is a pickle, convert writes safetensors"]
    others = sorted({file.name for file in head.path.glob("*.safetensors")} - set(head.files))
    if others and not (head.path / "model.safetensors.index.json").is_file():
        return [f"vLLM would read {others[0]}, too, which the index leaves out"]
    return []


def _of_tensors(head: Head, wanted: Mapping[str, Any]) -> list[str]:
    stored = {_as_vllm_names(head, name): shape for name, shape in head.stored.items()}
    missing = sorted(wanted.keys() - stored.keys() - {"t2d"})
    unknown = sorted(stored.keys() - wanted.keys() - {"t2d"})
    if missing:
        theirs = next((name for name in unknown if name.endswith(missing[0])), "another name")
        return [f"its tensors are called {theirs}, where vLLM looks for {missing[0]}"]
    if unknown:
        return [f"vLLM has no place for {unknown[0]}, which nothing needs"]
    padded = [name for name, tensor in wanted.items() if name in stored and stored[name] != tuple(tensor.shape)]
    return [f"{name} has {stored[name][0]} rows, vLLM takes {wanted[name].shape[0]}; the rest is padding" for name in padded[:1]]


def _as_vllm_names(head: Head, name: str) -> str:
    return name.replace("midlayer.", "layers.0.") if head.kind == "EAGLE-3" else name


def _of_settings(head: Head, wanted: Mapping[str, Any]) -> list[str]:
    nested = nested_settings(head.config)
    if nested is not None:
        return [f"config.json keeps the layer's settings under {nested}, of which vLLM misses what is not written out"]
    wanted = {**wanted, **_biases(head.has_bias("qkv"), head.has_bias("o"), head.has_bias("mlp"))}
    wanted |= {"target_hidden_size": head.target_hidden_size}
    read = _vllms_reading(head, head.config)
    if head.shifted_aux_layers and read[AUX_LAYERS] != wanted[AUX_LAYERS]:
        return [
            f"{AUX_LAYERS} {read[AUX_LAYERS]} count the target's layers by their own index, vLLM by their outputs "
            f"{wanted[AUX_LAYERS]}, one more each"
        ]
    return [_difference(name, read[name], wanted.get(name)) for name in read if read[name] != wanted.get(name)]


def _biases(qkv: bool, o: bool, mlp: bool) -> dict[str, bool]:
    return {"q, k, v biases": qkv, "o_proj biases": o, "MLP biases": mlp}


def _difference(name: str, found: Any, wanted: Any) -> str:
    if name.endswith(" biases"):
        return f"the checkpoint has {'' if wanted else 'no '}{name}, and vLLM would read the opposite from its config.json"
    if name == "architectures" and wanted == [BIASED_ARCHITECTURE]:
        return "its fc.bias has no place in vLLM's own EAGLE class"
    says = f"lacks {name}" if found is None else f"says {name} {found!r} to vLLM"
    return f"config.json {says}, it should be {'left out' if wanted is None else repr(wanted)}"


def _vllms_reading(head: Head, config: Mapping[str, Any]) -> dict[str, Any]:
    """What vLLM takes from this config.json for each of the settings that convert writes."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    read: dict[str, Any] = {
        "model_type": config.get("model_type"),
        "architectures": _vllms_classes(head, config.get("architectures") or []),
        "hidden_size": hidden,
        "vocab_size": config.get("vocab_size"),
        "num_hidden_layers": config.get("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": _or(config.get("num_key_value_heads"), heads),
        "head_dim": _or(config.get("head_dim"), head.hidden_size // head.num_heads),
        "intermediate_size": config.get("intermediate_size"),
        "rope_parameters": rope_parameters(config),
        **{name: config.get(name, default) for name, default in DEFAULTS.items()},
        # Not of Llama's layers: code to run, and which of the target's layers slide.
        **{name: config[name] for name in ("auto_map", "layer_types") if config.get(name)},
    }
    # `bias` is the attention's here, not fc's.
    attention, either = bool(config.get("attention_bias")), bool(config.get("attention_bias") or config.get("bias"))
    qkv = attention if head.kind == "EAGLE-3" else bool(config.get("qkv_bias", either))
    llama = head.model_type == "llama"  # Qwen3's layers have no other biases
    read |= _biases(qkv, llama and either, llama and bool(config.get("mlp_bias")))
    if head.kind == "EAGLE-1":
        return read
    nested = config.get("eagle_config") or {}
    named = config.get(AUX_LAYERS) or nested.get(AUX_LAYERS)
    counted = (config.get("num_aux_layers") if head.model_type == "qwen3" else None) or config.get("num_aux_hidden_states")
    also_counted = nested.get(AUX_LAYERS) or (config.get(AUX_LAYERS) if head.model_type == "qwen3" else None)
    return read | {
        "draft_vocab_size": _or(config.get("draft_vocab_size"), config.get("vocab_size")),
        "target_hidden_size": config.get("target_hidden_size", hidden),  # null is no default here
        "num_aux_hidden_states": _or(counted, len(also_counted) if also_counted else 3),
        **({AUX_LAYERS: named} if named else {}),
        **{flag: bool(said_of_norm(config, flag)) for flag in NORM_FLAGS},
    }


def _vllms_classes(head: Head, architectures: list[Any]) -> list[str]:
    names = [str(name) for name in architectures]
    if head.kind == "EAGLE-1":
        return [name if name.startswith("Eagle") else f"Eagle{name}" for name in names]
    full = [name if name.startswith("Eagle3") or name.endswith("Eagle3") else f"Eagle3{name}" for name in names]
    return [_ALSO_KNOWN_AS.get(name, name) for name in full]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
