"""After vLLM has loaded a head: what it takes from the target, and whether every tensor found its place.

A head that drafts with the target's LM head drafts with all of it: with the scale or soft cap that the target puts on its logits,
and, where the target has no module for it because it is its embedding, with that.
"""

from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.model_executor.models.interfaces import supports_multimodal

from vllm_eagle.heads.checkpoint import tensor_names
from vllm_eagle.heads.formats import ATTENTION, AUX_LAYERS, MLP, UNUSED

_FUSED = {"qkv_proj": ATTENTION, "gate_up_proj": MLP[:2]}
# MTP modules with a layer of ordinary attention, which drafts at any depth, by vLLM's names: how names of their tensors begin.
MTP_MODULES = {
    "ErnieMTPModel": "model.mtp_block.",
    "ExaoneMoeMTP": "mtp.layers.",
    "Glm4MoeMTPModel": "model.layers.{layers}.",  # behind the target's own
    "HYV3MTPModel": "model.layers.{layers}.",
    "MiMoMTPModel": "model.mtp_layers.",
}
_FROM_FILES = ("weight", "bias", "draft_id_to_target_id")  # other parameters are made of these, where a head is quantized


def language_model_of(target: Any) -> Any:
    """What a head shares embedding and LM head with: of a model that sees pictures, the part behind its tower."""
    return target.get_language_model() if supports_multimodal(target) else target


def complete(head: nn.Module, target: nn.Module, config: VllmConfig) -> None:
    """Share the target's logits with the head if it has no LM head of its own, then see that all of the head is there.

    What it shares with a target that takes LoRA adapters it gets without them: drafts are those for the base model, of which fewer
    are accepted where an adapter changes much.

    Raises:
        ValueError: the target's LM head cannot be found; or the files hold less than the head, or more.
    """
    if not head.has_own_lm_head:
        _share_logits(head, target, config)
    for owner, name in ((head.model, "embed_tokens"), (head, "lm_head")):
        layer = owner._modules.get(name)
        if layer is not None:
            owner.add_module(name, _without_adapters(layer))
    folder = Path(config.speculative_config.draft_model_config.model)
    if config.load_config.load_format == "dummy" or not folder.is_dir():
        return
    own = {"embed_tokens.weight": head.has_own_embed_tokens, "lm_head.weight": head.has_own_lm_head}
    parameters = [name for name, _ in head.named_parameters(remove_duplicate=False)]
    missing, ignored = unmatched(parameters, tensor_names(folder), {name for name, has in own.items() if not has})
    if missing or ignored:
        told = [f"{', '.join(missing)} got no values"] if missing else []
        told += [f"{', '.join(ignored)} went nowhere"] if ignored else []
        raise ValueError(
            f"head {folder}: {' and '.join(told)} in {type(head).__name__}; `vllm-eagle inspect {folder}`, and please report it: "
            "such a head should not have come so far"
        )


def see_module(config: VllmConfig) -> None:
    """See that the target's checkpoint holds the MTP module that it names: vLLM leaves a module without weights as it is.

    Raises:
        ValueError: it does not.
    """
    module = config.speculative_config.draft_model_config
    folder = Path(module.model)
    if config.load_config.load_format == "dummy" or not folder.is_dir():
        return
    begin = MTP_MODULES[module.hf_config.architectures[0]].format(layers=config.model_config.get_total_num_hidden_layers())
    if not any(name.startswith(begin) for name in tensor_names(folder)):
        raise ValueError(f"model {folder}: its weights hold no MTP module ({begin}*); get the whole checkpoint, or an EAGLE head")


def _share_logits(head: nn.Module, target: nn.Module, config: VllmConfig) -> None:
    if getattr(target, "lm_head", None) is None:
        if not config.model_config.hf_text_config.tie_word_embeddings:
            raise ValueError(f"model: {type(target).__name__} has no lm_head that the head could draft with; use an EAGLE-3 head")
        head.lm_head = _without_adapters(target.model.embed_tokens)
    head.logits_processor = _without_adapters(target.logits_processor)


def name_aux_layers(config: VllmConfig) -> None:
    """Before anything is loaded: target layers that a head names under `eagle_config` alone, where vLLM's V1 runner reads them, are
    named where its V2 runner looks, too. It would take default ones.
    """
    settings = config.speculative_config.draft_model_config.hf_config
    layers = (getattr(settings, "eagle_config", None) or {}).get(AUX_LAYERS)
    if layers and not getattr(settings, AUX_LAYERS, None):
        settings.update({AUX_LAYERS: layers})


def _without_adapters(layer: nn.Module) -> nn.Module:
    """Adapters go by rows of the target's batch, and the head's are others."""
    return layer.base_layer if isinstance(layer, BaseLayerWithLoRA) else layer


def unmatched(
    parameters: Iterable[str],  # of vLLM's module
    tensors: Set[str],  # in the files
    shared: Set[str],  # tensors whose parameters are the target's
) -> tuple[list[str], list[str]]:
    """Tensors that parameters lack, and tensors that no parameter takes."""
    wanted: set[str] = set()
    for parameter in parameters:
        if parameter.rsplit(".", 1)[-1] in _FROM_FILES:
            wanted |= set(sources(parameter))
    found = {name.replace("midlayer.", "layers.0.") for name in tensors} - {"t2d"}
    missing = [name for name in sorted(wanted - found - shared) if not UNUSED.fullmatch(name)]
    return missing, sorted(found - wanted)


def sources(parameter: str) -> list[str]:
    """Names in the files of the tensors that a parameter is made of, in order."""
    name = parameter.removeprefix("model.").replace("draft_id_to_target_id", "d2t")
    for fused, parts in _FUSED.items():
        if f".{fused}." in name:
            return [name.replace(fused, part) for part in parts]
    return [name]
