"""What the engine asks of a device's attention. One file per device implements it: cpu.py, cuda.py.

- The metadata builder takes the trees of a verification pass and divides the rows of the metadata that it has built into those of
  trees and the rest: `attach(metadata, batch)` from the host, in vLLM's V1 runner on CPUs; `attach_prefix(metadata, trees, ...)`
  from the device, of the first requests of a batch, in its V2 runner.
- The implementation says whether its layer can run trees: `TreeAttention`.
- The head's passes over tree levels get metadata of their own instead of what the builder makes: `levels.DraftLevels`.

Keys and values of a verification pass are written by vLLM: node i of a tree goes to the slot of position context_len + i in the
request's own block table.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention, MLAAttention

from vllm_eagle.algorithm.config import CONFIG_KEY

CUDA_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "CUSTOM")  # in whose places cuda.py puts backends with tree rows
LATENT_BACKEND = "TRITON_MLA"  # likewise, of layers with latent attention (MLA)


@runtime_checkable
class TreeAttention(Protocol):
    """A layer's attention, which runs passes with trees where its metadata has any, and passes over tree levels."""

    def not_supported_reasons(self, max_model_len: int) -> list[str]:
        """Why this layer cannot run tree rows; empty if it can."""


def window_is_asked(vllm_config: VllmConfig) -> bool:
    """Whether options ask for a window over what the head attends to, and not only the head itself."""
    asked = vllm_config.additional_config.get(CONFIG_KEY, {}).get("draft_window") or 0
    return 0 < asked < vllm_config.model_config.max_model_len


def check_layers(layers: Mapping[str, Any], max_model_len: int) -> None:
    """Ask every attention layer of target and head, by name, whether it can run trees.

    Raises:
        ValueError: a layer cannot; the message says why.
    """
    for name, layer in layers.items():
        if not isinstance(layer, (Attention, MLAAttention)):
            continue
        if not isinstance(layer.impl, TreeAttention):
            raise ValueError(
                f"vllm_eagle cannot run draft trees with layer {name}: {layer.get_attn_backend().get_name()} is vLLM's own "
                "attention, without trees. Something chose it after the configuration was checked."
            )
        reasons = layer.impl.not_supported_reasons(max_model_len)
        if reasons:
            raise ValueError(f"vllm_eagle cannot run draft trees with layer {name}: {'; '.join(reasons)}")
