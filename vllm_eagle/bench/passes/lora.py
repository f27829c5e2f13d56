"""A LoRA adapter of random weights for a Llama-like checkpoint, in PEFT's format: enough to change what the model says."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_eagle.heads.checkpoint import read_tensors

RANK = 8
MODULES = ("q_proj", "v_proj", "o_proj", "down_proj")


def random_adapter(model: Path, folder: Path, strength: float = 0.3, seed: int = 0) -> Path:
    """Write an adapter whose update of each weight has about `strength` of the weight's norm; returns `folder`."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in read_tensors(model).items():
        layer = name.removesuffix(".weight")
        if not layer.endswith(MODULES):
            continue
        out, into = weight.shape
        down, up = torch.randn(RANK, into, generator=generator), torch.randn(out, RANK, generator=generator)
        scale = (strength * float(weight.float().norm()) / float((up @ down).norm())) ** 0.5
        tensors[f"base_model.model.{layer}.lora_A.weight"] = down * scale
        tensors[f"base_model.model.{layer}.lora_B.weight"] = up * scale
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": list(MODULES)}))
    return folder
