"""Features for EAGLE-3 heads from targets whose class in vLLM hands out none: their layers are listened to.

A hook on a layer writes the hidden state into a buffer of that layer, and a hook on the model puts the buffers beside its output,
where vLLM's runner looks for features. torch.compile traces the hooks of layers with the layers, if they are there before the first
pass. They are buffers of layers because a compiled graph is kept on disk: another process finds its tensors by name in the model.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

HandedOn = Literal["sum", "first"]

# What a layer of the class returns, which no name and no type tells: parts whose sum is the hidden state, or the hidden state
# itself, with or without something beside it. tests/engine/test_families.py holds each class against transformers'.
LISTENED: dict[str, HandedOn] = {
    "CohereForCausalLM": "first",
    "Gemma2ForCausalLM": "sum",
    "Gemma3ForCausalLM": "sum",
    "GemmaForCausalLM": "sum",
    "Glm4ForCausalLM": "sum",
    "GraniteMoeForCausalLM": "first",
    "MixtralForCausalLM": "sum",
    "NemotronForCausalLM": "sum",
    "OlmoeForCausalLM": "sum",
    "Qwen2MoeForCausalLM": "sum",
    "StablelmForCausalLM": "first",
}

# Classes without the interface that return what their language model does, which has it.
HANDED_ON = ("Qwen2VLForConditionalGeneration",)


def listen(
    model: nn.Module,  # of a class in LISTENED, before its first pass
    layers: Iterable[int],  # n is the input of decoder layer n, as vLLM counts them
    most_tokens: int,  # in a pass
    hidden_size: int,
    dtype: torch.dtype,
) -> None:
    """Make the model return its output and a list of features [num_tokens, hidden], by rising layer, good until the next pass.

    Raises:
        ValueError: the target has no such layer.
    """
    decoder_layers, wanted = model.model.layers, sorted(set(layers))
    if not all(0 <= n <= len(decoder_layers) for n in wanted):
        raise ValueError(f"the head reads layers {wanted} of a target that has {len(decoder_layers)}; take a head for this target")
    note = {"sum": _note_sum, "first": _note_first}[LISTENED[type(model).__name__]]
    device, places = next(model.parameters()).device, []
    for n in wanted:
        buffer = torch.zeros(most_tokens, hidden_size, dtype=dtype, device=device)
        layer, name = (decoder_layers[n - 1], "feature_behind") if n else (decoder_layers[0], "feature_before")
        layer.register_buffer(name, buffer, persistent=False)
        if n:
            layer.register_forward_hook(note)
        else:
            layer.register_forward_pre_hook(_note_input, with_kwargs=True)
        places.append((layer, name))

    def with_features(_model: nn.Module, _inputs: Any, output: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return output, [layer.get_buffer(name)[: len(output)] for layer, name in places]

    model.register_forward_hook(with_features)


def _note_sum(layer: Any, _inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    layer.feature_behind[: output[0].shape[0]].copy_(output[0] + output[1])


def _note_first(layer: Any, _inputs: Any, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
    hidden = output[0] if isinstance(output, tuple) else output
    layer.feature_behind[: hidden.shape[0]].copy_(hidden)


def _note_input(layer: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    hidden = named["hidden_states"] if "hidden_states" in named else inputs[1]  # behind the positions
    layer.feature_before[: hidden.shape[0]].copy_(hidden)
