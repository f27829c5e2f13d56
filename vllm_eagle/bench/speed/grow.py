"""A larger model that computes what a smaller one does: real answers and real acceptance at a realistic cost.

A step of the shipped target takes less time than the Python around it, so its clock says little about speculation. `grow` widens
its MLPs and adds layers on top. New MLP units have zero columns in `down_proj`, new layers zero in `o_proj` and `down_proj`, so all
that is new adds exact zeros; other new weights are random. Logits are equal up to the order in which a matrix product is summed.
"""

import argparse
import shutil
from pathlib import Path

import torch

from vllm_eagle.heads.checkpoint import read_config, read_tensors, write

NUM_LAYERS, INTERMEDIATE_SIZE = 24, 10240  # the shipped target grows to 296 million parameters
GROWN_FROM = "vllm_eagle_grown_from"  # in config.json


def grow(
    source: Path, folder: Path, num_layers: int = NUM_LAYERS, intermediate_size: int = INTERMEDIATE_SIZE, seed: int = 0
) -> Path:
    """Write a grown copy of the Llama-like checkpoint in `source` to `folder`, tokenizer included; returns `folder`.

    A head's features stay what they were, those of EAGLE-3 too: the layers that it names are the lowest ones.

    Raises:
        ValueError: the sizes are smaller than the model's, it is no Llama, a file is missing or broken, or the folder is taken.
    """
    config = read_config(source)
    if config.get("model_type") not in ("llama", "mistral", "qwen2", "qwen3"):
        raise ValueError(f"{source}: model_type {config.get('model_type')!r} cannot be grown; give a Llama, Mistral or Qwen model")
    had_layers, had_units = config["num_hidden_layers"], config["intermediate_size"]
    if num_layers < had_layers or intermediate_size < had_units:
        raise ValueError(
            f"num_layers={num_layers} and intermediate_size={intermediate_size} must be at least the model's, "
            f"{had_layers} and {had_units}"
        )
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: _widen(name, tensor, intermediate_size - had_units, generator) for name, tensor in read_tensors(source).items()
    }
    top = f"model.layers.{had_layers - 1}."
    for layer in range(had_layers, num_layers):
        for name, tensor in list(tensors.items()):
            if name.startswith(top):
                new = name.replace(top, f"model.layers.{layer}.")
                tensors[new] = torch.zeros_like(tensor) if "o_proj" in name or "down_proj" in name else _like(tensor, generator)
    sizes = {"num_hidden_layers": num_layers, "intermediate_size": intermediate_size, GROWN_FROM: source.name}
    if "layer_types" in config:
        sizes["layer_types"] = config["layer_types"] + config["layer_types"][-1:] * (num_layers - had_layers)
    write(folder, config | sizes, tensors)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".model") and not (folder / file.name).exists():
            shutil.copy(file, folder)
    return folder


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-layers", type=int, default=NUM_LAYERS, help="default: %(default)s")
    parser.add_argument("--intermediate-size", type=int, default=INTERMEDIATE_SIZE, help="default: %(default)s")
    args = parser.parse_args()
    try:
        print(grow(args.source, args.folder, args.num_layers, args.intermediate_size))
    except ValueError as error:
        parser.error(str(error))


def _widen(name: str, tensor: torch.Tensor, more: int, generator: torch.Generator) -> torch.Tensor:
    """An MLP weight with more units: random inputs, outputs of zero."""
    if name.endswith(("gate_proj.weight", "up_proj.weight")):
        new = torch.randn(more, tensor.shape[1], generator=generator) * tensor.float().std()
        return torch.cat([tensor, new.to(tensor.dtype)])
    if name.endswith("down_proj.weight"):
        return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], more)], dim=1)
    return tensor


def _like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Weights of a new layer: norms as below, matrices random and as large as below."""
    if tensor.dim() == 1:
        return tensor.clone()
    return (torch.randn(tensor.shape, generator=generator) * tensor.float().std()).to(tensor.dtype)


if __name__ == "__main__":
    main()
