"""What the engine asks of a device's attention. One file per device implements it: cpu.py, cuda.py.

- The metadata builder takes the trees of a verification pass: `attach(metadata, batch)` divides the rows of the metadata that it
  has built into those of the batch's trees and the rest.
- The implementation says whether its layer can run trees: `TreeAttention`.
- The head's passes over tree levels get metadata of their own instead of what the builder makes: `levels.DraftLevels`.

Keys and values of a verification pass are written by vLLM: node i of a tree goes to the slot of position context_len + i in the
request's own block table.
"""

from typing import Protocol, runtime_checkable

CUDA_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "CUSTOM")  # in whose places cuda.py puts backends with tree rows


@runtime_checkable
class TreeAttention(Protocol):
    """A layer's attention, which runs passes with trees where its metadata has any, and passes over tree levels."""

    def not_supported_reasons(self, max_model_len: int) -> list[str]:
        """Why this layer cannot run tree rows; empty if it can."""
