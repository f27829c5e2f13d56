"""Write the model of a GGUF file as transformers and vLLM load it, in bfloat16: `python unpack.py GGUF_FILE FOLDER`.

A script, which real.py runs with the package gguf on its path: transformers reads such files with it.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig


def unpack(gguf: Path, folder: Path) -> None:
    """Weights, configuration, tokenizer and chat template."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    whole = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, quantization_config=whole, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    unpack(*map(Path, sys.argv[1:]))
