"""What a head is, whatever format it comes in.

EAGLE-1 and EAGLE-2 heads are one layout: `fc` over the next token's embedding and the target's last feature, then decoder layers
of which the first has no input norm, then the target's LM head (arXiv 2401.15077, section 3.1). EAGLE-3 heads (arXiv 2503.01840,
section 3.1) have `fc` over features of several target layers, a first layer that reads embedding and feature side by side, a
final norm and an LM head of their own, often over a part of the vocabulary: `target id = draft id + d2t[draft id]`.

    format       weights                                     settings
    safeailab    first EAGLE-3 layer is `midlayer.`          flat; `bias` means fc.bias, and absent means true
    specforge    as safeailab                                flat, architecture LlamaForCausalLMEagle3
    speculators  EAGLE-3 only, layers are `layers.N.`        the layer's under `transformer_layer_config`
    vllm         layers are `layers.N.`                      flat; `bias` would mean biases of the attention
    nested       as vllm                                     the layer's under `model`, as vLLM's converter once wrote them

Where tensors and settings disagree about something that only one of them can be wrong about, tensors are believed: how many layers
there are, which norms, how many rows of a vocabulary are padding. reading.py tells where vLLM would believe something else.
"""

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vllm_eagle.heads import checkpoint

if TYPE_CHECKING:
    import torch

Kind = Literal["EAGLE-1", "EAGLE-3"]
Format = Literal["vllm", "safeailab", "specforge", "speculators", "nested"]

BIASED_ARCHITECTURE = "EagleBiasedLlamaForCausalLM"  # our class in vLLM's registry: engine/biased_head.py
# Target and head of bench/recorded/replay_models.py
REPLAYED_ARCHITECTURES = ("ReplayedLlamaForCausalLM", "EagleReplayedLlamaForCausalLM")
NORM_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
WINDOW = "draft_window"  # in config.json: newest tokens that a head attends to; ours, which vLLM does not look at
AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"
ATTENTION = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

# Settings that a format spells in its own way, say nothing about the layer, or name code to run.
_NOT_OF_THE_LAYER = {
    *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "auto_map", "_name_or_path"),
    *("bias", "qkv_bias", "attention_bias", "mlp_bias", "rope_theta", "rope_scaling", "rope_parameters"),
    *("draft_vocab_size", "target_hidden_size", "num_aux_hidden_states", "num_aux_layers", "eagle_config", AUX_LAYERS, *NORM_FLAGS),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
}

# Angles of rotary embeddings, which some versions of transformers stored; every loader computes them.
_COMPUTED = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
_LAYER = re.compile(r"layers\.(\d+)\.")
# vLLM builds one in every layer of an EAGLE-3 head, and runs the first one's.
UNUSED = re.compile(r"layers\.[1-9]\d*\.hidden_norm\.weight")
# Tensors that come with a norm, by the setting that switches it on.
NORM_TENSORS = {"norm_before_fc": "input_norm.weight", "fc_norm": "fc_norm.0.weight"}

# What transformers' LlamaConfig, and SafeAILab's copy of it, take for granted; vLLM reads speculators' settings without them.
DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}


@dataclass(frozen=True, slots=True)
class Head:
    """A head under vLLM's names. Nothing is checked here but what reading needs: see check.py."""

    path: Path
    kind: Kind
    format: Format
    files: tuple[str, ...]
    config: dict[str, Any]  # config.json as it is
    stored: dict[str, tuple[int, ...]]  # names and shapes in the files
    tensors: "dict[str, torch.Tensor]"  # under vLLM's names, without rows of padding
    layer: dict[str, Any]  # settings of the decoder layer, by transformers' names, rotary embedding as rope_parameters
    model_type: Literal["llama", "qwen3"]
    hidden_size: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    draft_vocab_size: int
    target_hidden_size: int
    aux_layers: tuple[int, ...] | None  # as vLLM counts: 0 is the embedding, k the output of the k-th layer; None: not named
    shifted_aux_layers: bool  # the checkpoint counts them from one less
    norms: dict[str, bool]  # NORM_FLAGS
    declared_fc_bias: bool | None  # what config.json says, if anything
    known_extremes: dict[str, tuple[float, float]] = field(default_factory=dict)  # of the tensors that were asked for

    def extremes(self, name: str) -> tuple[float, float]:
        """Smallest and largest value of a tensor, both NaN if one is. Files of gigabytes are read for this once, without a copy."""
        if name not in self.known_extremes:
            tensor = self.tensors[name]
            found = tensor.aminmax() if tensor.numel() else (0.0, 0.0)
            self.known_extremes[name] = float(found[0]), float(found[1])
        return self.known_extremes[name]

    @property
    def fc_bias(self) -> bool:
        """Whether the head's `fc` has a bias."""
        return "fc.bias" in self.tensors

    @property
    def sliding_window(self) -> int | None:
        """Of all its layers, as it was trained; None: they have full attention."""
        nested = nested_settings(self.config)
        return window_of_layers(self.config if nested is None else self.config[nested])

    @property
    def num_aux(self) -> int:
        """Target layers that `fc` reads, as its width has it; rounded down if the width is no multiple."""
        fc = self.tensors.get("fc.weight")
        return 0 if fc is None or fc.dim() != 2 else fc.shape[1] // self.target_hidden_size

    def has_bias(self, part: Literal["qkv", "o", "mlp"]) -> bool:
        """Whether any layer has a bias in this part."""
        return _has_bias(self.tensors.keys(), part)


def read_head(folder: Path) -> Head:
    """Read a head of any known format.

    Raises:
        ValueError: unreadable, no EAGLE head, or without the settings that every head has.
    """
    config = read_config(folder)
    read = checkpoint.read_tensors(folder)
    tensors = _named(folder, read)
    kind = _kind(folder, config, tensors.keys())
    files = tuple(file.name for file in checkpoint.weight_files(folder))
    form = _format(config, kind, read.keys(), files)
    settings = _layer_settings(folder, config)
    file = folder / checkpoint.CONFIG
    hidden = _integer(file, settings, "hidden_size")
    heads = _integer(file, settings, "num_attention_heads")
    vocab = _integer(file, settings, "vocab_size")
    drafted = _rows(tensors, "d2t", min(vocab, _rows(tensors, "lm_head.weight", vocab)))
    draft_vocab = _integer(file, config, "draft_vocab_size", drafted) if kind == "EAGLE-3" else vocab
    has_qk_norms = kind == "EAGLE-3" and any(name.endswith("self_attn.q_norm.weight") for name in tensors)
    aux_layers, shifted = _aux_layers(file, config, kind, read.keys())
    return Head(
        path=folder,
        kind=kind,
        format=form,
        files=files,
        config=config,
        stored={name: tuple(tensor.shape) for name, tensor in read.items()},
        tensors=_without_padding(tensors, {"embed_tokens.weight": vocab, "lm_head.weight": draft_vocab}),
        layer=DEFAULTS
        | {k: v for k, v in settings.items() if k not in _NOT_OF_THE_LAYER and v is not None}
        | {"rope_parameters": rope_parameters(settings)},
        model_type="qwen3" if has_qk_norms else "llama",
        hidden_size=hidden,
        vocab_size=vocab,
        num_layers=1 + max(int(match[1]) for name in tensors if (match := _LAYER.match(name))),
        num_heads=heads,
        num_kv_heads=_integer(file, settings, "num_key_value_heads", heads),
        head_dim=_integer(file, settings, "head_dim", hidden // heads),
        intermediate_size=_integer(file, settings, "intermediate_size"),
        draft_vocab_size=draft_vocab,
        target_hidden_size=_integer(file, config, "target_hidden_size", hidden),
        aux_layers=aux_layers,
        shifted_aux_layers=shifted,
        norms={flag: _norm_flag(file, config, flag, tensors.keys()) for flag in NORM_FLAGS},
        declared_fc_bias=_declared_fc_bias(config, form) if kind == "EAGLE-1" else None,
    )


def _named(folder: Path, tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """The tensors under vLLM's names: without a prefix that all modules have, which the name of `fc` shows."""
    prefixes = [name.removesuffix("fc.weight") for name in tensors if name == "fc.weight" or name.endswith(".fc.weight")]
    prefix = prefixes[0] if len(prefixes) == 1 else ""
    named = {}
    for name, tensor in tensors.items():
        new = name.removeprefix(prefix)
        new = "layers.0." + new.removeprefix("midlayer.") if new.startswith("midlayer.") else new
        if new in named:
            raise ValueError(f"{folder}: {new} is in the weights twice, once as {name}; keep only one of them")
        if not new.endswith(_COMPUTED):
            named[new] = tensor
    return named


def _without_padding(tensors: "dict[str, torch.Tensor]", rows: Mapping[str, int]) -> "dict[str, torch.Tensor]":
    """Without rows that no token has: some trainers round vocabularies up."""
    return {name: tensor[: rows[name]] if name in rows and tensor.dim() == 2 else tensor for name, tensor in tensors.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """A head's config.json, in which what is looked into has the right type.

    Raises:
        ValueError: it is missing, broken, or no head's.
    """
    config = checkpoint.read_config(folder)
    kinds: dict[str, type] = {"transformer_layer_config": dict, "eagle_config": dict, "architectures": list}
    kinds |= {"model": dict} if config.get("model_type") == "eagle" else {}
    for name, kind in kinds.items():
        if name in config and not isinstance(config[name] or kind(), kind):
            raise ValueError(f"{folder / checkpoint.CONFIG}: {name} is {config[name]!r}, not a JSON {kind.__name__}; correct it")
    return config


def rope_parameters(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding as transformers 5 writes it, from that or from rope_theta and rope_scaling."""
    scaling = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    kind = scaling.pop("type", "default")
    theta = settings.get("rope_theta", 10000.0)
    if scaling.get("rope_type", kind) in ("llama3", "yarn", "longrope"):
        trained = settings.get("original_max_position_embeddings") or settings.get("max_position_embeddings")
        scaling.setdefault("original_max_position_embeddings", trained or DEFAULTS["max_position_embeddings"])
    found = {"rope_type": kind, "rope_theta": theta} | scaling
    if found["rope_type"] == "mrope":  # an old name for M-RoPE's three rows of positions, which vLLM reads as the usual one, too
        found["rope_type"] = "default"
    return found


def _kind(folder: Path, config: Mapping[str, Any], names: Set[str]) -> Kind:
    type_of_speculator = config.get("speculators_model_type", "eagle3")
    if type_of_speculator != "eagle3":
        raise ValueError(
            f'{folder}: a "{type_of_speculator}" speculator; of the speculators formats only "eagle3" is an EAGLE head'
        )
    if any(_LAYER.match(name) for name in names):
        if any(name.endswith("hidden_norm.weight") for name in names) or "d2t" in names:
            return "EAGLE-3"
        if "fc.weight" in names:
            return "EAGLE-1"
    raise ValueError(
        f"{folder}: no EAGLE head, its weights have neither fc.weight with layers.0 (EAGLE-1) nor a hidden_norm (EAGLE-3); "
        "give the folder of the head, not of a target"
    )


def _format(config: Mapping[str, Any], kind: Kind, names: Set[str], files: tuple[str, ...]) -> Format:
    architecture = str((config.get("architectures") or [""])[0])
    if "speculators_model_type" in config:
        return "speculators"
    if nested_settings(config) == "model":
        return "nested"
    if kind == "EAGLE-3":
        if not any("midlayer." in name for name in names):
            return "vllm"
        return "specforge" if architecture == "LlamaForCausalLMEagle3" else "safeailab"
    if architecture.startswith("Eagle"):
        return "vllm"
    in_theirs = "bias" in config or "fc.bias" in names or files[0].endswith(".bin")
    return "safeailab" if in_theirs else "vllm"


def nested_settings(config: Mapping[str, Any]) -> str | None:
    """Under which key config.json keeps the settings of the layer; None: they are at the top."""
    if config.get("transformer_layer_config"):
        return "transformer_layer_config"
    return "model" if config.get("model_type") == "eagle" and config.get("model") else None


def _layer_settings(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = nested_settings(config)
    settings: Mapping[str, Any] = config if nested is None else config[nested]
    if nested == "model":
        # Whatever is said at the top again goes before it.
        settings = {key: config.get(key, value) if key not in _NOT_OF_THE_LAYER else value for key, value in settings.items()}
    if "quantization_config" in config or "quantization_config" in settings:
        raise ValueError(f"{folder}: a quantized head; only unquantized heads are handled, get the original weights")
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(settings.get(name) or {}, dict):
            raise ValueError(f"{folder / checkpoint.CONFIG}: {name} is {settings[name]!r}, not a JSON object; correct it")
    window = window_of_layers(settings)
    if window is not None:
        return {**settings, WINDOW: window}
    if settings.get("use_sliding_window") or "sliding_attention" in (settings.get("layer_types") or []):
        raise ValueError(
            f"{folder}: a head with sliding-window attention in some layers, or without a sliding_window; only full attention, or "
            "one sliding_window in all layers (layer_types), is handled"
        )
    return settings


def window_of_layers(settings: Mapping[str, Any]) -> int | None:
    """The sliding window that all layers of a head have; None: not all of them, or none."""
    kinds, window = settings.get("layer_types"), settings.get("sliding_window")
    slides = isinstance(kinds, list) and kinds and set(map(str, kinds)) == {"sliding_attention"}
    return window if slides and isinstance(window, int) and not isinstance(window, bool) and window > 0 else None


def _aux_layers(file: Path, config: Mapping[str, Any], kind: Kind, names: Set[str]) -> tuple[tuple[int, ...] | None, bool]:
    nested = config.get("eagle_config") or {}
    if kind == "EAGLE-3" and not nested.get("use_aux_hidden_state", True):
        raise ValueError(f"{file}: use_aux_hidden_state is false; such a head reads one feature only and is not handled")
    layers = config.get(AUX_LAYERS) or nested.get(AUX_LAYERS)
    if not layers or kind == "EAGLE-1":
        return None, False
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise ValueError(f"{file}: {AUX_LAYERS} is no list of integers; correct it or give --aux-layers")
    shifted = _counts_from_one_less(config, names)
    return tuple(layer + shifted for layer in layers), shifted


def in_vllms_order(layers: Sequence[int]) -> bool:
    """Whether target layers are named as vLLM hands their features over: each once, from the lowest to the highest."""
    return list(layers) == sorted(set(layers))


def _counts_from_one_less(config: Mapping[str, Any], names: Set[str]) -> bool:
    """Whether target layers are named in the other one of the two ways of counting that are about.

    Trainers that write the list under eagle_config, beside `midlayer.` weights, and start with 1 name layers by their own index, of
    whose outputs vLLM says one more; SGLang tells the two apart by the same 1.
    """
    layers = (config.get("eagle_config") or {}).get(AUX_LAYERS)
    if config.get(AUX_LAYERS) or not isinstance(layers, list):
        return False
    return layers[:1] == [1] and any("midlayer." in name for name in names)


def _declared_fc_bias(config: Mapping[str, Any], form: Format) -> bool | None:
    return {"safeailab": config.get("bias"), "nested": config.get("eagle_fc_bias")}.get(form)


def _norm_flag(file: Path, config: Mapping[str, Any], flag: str, names: Set[str]) -> bool:
    if flag == "norm_before_residual" and "speculators_model_type" in config and flag not in config:
        raise ValueError(f"{file}: lacks norm_before_residual, and loaders differ in what that means; add true or false")
    said = said_of_norm(config, flag)
    return NORM_TENSORS.get(flag) in names if said is None else bool(said)


def said_of_norm(config: Mapping[str, Any], flag: str) -> Any:
    """What config.json says of one of NORM_FLAGS, where vLLM looks for it; None: nothing."""
    nested = (config.get("eagle_config") or {}) if flag == "norm_before_fc" else {}
    return nested.get(flag, config.get(flag))


def _integer(file: Path, settings: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = settings.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{file}: {name} is {value!r}, not a positive integer; correct it")
    return value


def _rows(tensors: "Mapping[str, torch.Tensor]", name: str, default: int) -> int:
    return int(tensors[name].shape[0]) if name in tensors and tensors[name].dim() else default


def _has_bias(names: Set[str], part: Literal["qkv", "o", "mlp"]) -> bool:
    modules = {"qkv": ATTENTION, "o": ("o_proj",), "mlp": MLP}[part]
    return any(name.endswith(f".{module}.bias") for name in names for module in modules)
