"""Quantized copies of a model, in the compressed-tensors format that vLLM loads: `quantize(source, folder, "W8A8")`.

Weights are rounded to the nearest step, without calibration: good enough to compare trees with plain decoding, where both sides run
the same weights. Schemes and formats are compressed-tensors' own; embeddings and the LM head stay as they are, as usual.

vLLM 0.32 runs both on a CPU without AMX: W8A8 (int8 weights per channel, activations quantized per token as they come) through
oneDNN, and W4A16 (packed int4 weights, a scale per group) through its own kernel, which wants layers whose sizes are multiples of
32, and half precision: with float32 it fails when the model is loaded.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch

from vllm_eagle.heads.checkpoint import read_config, read_tensors, write

if TYPE_CHECKING:
    from compressed_tensors.quantization.quant_scheme import QuantizationScheme

Scheme = Literal["W8A8", "W4A16"]
GROUP_SIZE = 32  # input channels that share a scale in W4A16; published checkpoints have 128, for layers many times as wide
FORMATS: dict[Scheme, str] = {"W8A8": "int-quantized", "W4A16": "pack-quantized"}


def quantize(source: Path, folder: Path, scheme_name: Scheme) -> Path:
    """Write a quantized copy of the checkpoint in `source` to `folder`, tokenizer included; returns `folder`.

    Raises:
        ValueError: the scheme is unknown, a file is missing or broken, the folder is taken, or the model is quantized already.
    """
    if scheme_name not in get_args(Scheme):
        raise ValueError(f"scheme {scheme_name!r} is unknown; use one of {', '.join(get_args(Scheme))}")
    settings = read_config(source)
    if "quantization_config" in settings:
        raise ValueError(f"{source}: is quantized already; give the original model")
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    scheme = preset_name_to_scheme(scheme_name, ["Linear"])
    if scheme_name == "W4A16":
        scheme.weights.group_size = GROUP_SIZE
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=FORMATS[scheme_name],
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=["lm_head"],
    )
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in read_tensors(source).items():
        if is_quantized(name):
            tensors |= {name.removesuffix("weight") + part: x for part, x in _compress(tensor, scheme, scheme_name).items()}
        else:
            tensors[name] = tensor
    write(folder, settings | {"quantization_config": config.model_dump(mode="json", exclude_none=True)}, tensors)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".model") and not (folder / file.name).exists():
            shutil.copy(file, folder)
    return folder


def is_quantized(name: str) -> bool:
    """Whether a tensor of a Llama-like checkpoint is the weight of a linear layer inside a decoder layer."""
    return name.endswith("_proj.weight") and ".layers." in name


def _compress(weight: torch.Tensor, scheme: "QuantizationScheme", scheme_name: Scheme) -> dict[str, torch.Tensor]:
    """The tensors that stand for one weight [out, in], by their names after the layer's."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = weight.float()
    groups = weight.unflatten(1, (-1, scheme.weights.group_size or weight.shape[1]))  # [out, num_groups, group_size]
    scale, _ = calculate_qparams(groups.amin(dim=2), groups.amax(dim=2), scheme.weights)
    compressor = BaseCompressor.get_value_from_registry(FORMATS[scheme_name])
    compressed: dict[str, torch.Tensor] = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    return compressed
