"""vLLM's CUDA attention backends with tree rows: their choice, what they share, and Triton's. Not run on a GPU yet.

| backend | tree rows run through | not for |
| --- | --- | --- |
| FLASH_ATTN (flash.py) | FlashAttention over the context, ours over the tree, vLLM's merge | float32, windows, sinks, fp8, hd256 |
| TRITON_ATTN | our kernel for both, in one launch where a context is short | - |
| CUSTOM (xformers.py) | xformers' partial attention over both, its merge | as FLASH_ATTN; soft caps, other heads |
| TRITON_MLA (mla.py) | our kernel over latents, for targets with latent attention; the head has one of the others | fp8 |

- float32: FlashAttention, which runs plain rows under CUSTOM, too, computes in 16 bits; vLLM refuses it.
- windows shorter than max_model_len: both would count them by row, as if a tree's rows were consecutive tokens.
- sinks: a score that every row has once more, in one of the parts that are merged.
- fp8 caches: FlashAttention wants the query quantized, too, xformers wants scales per token.
- hd256: heads of 256 on GPUs where FlashAttention 4 has a kernel of its own for them (Blackwell), which wants other pages.
- other heads: xformers knows powers of two from 16 to 512.
- None of them runs ALiBi, what is not causal, or caches of other types than 16 and 32 bits and fp8 (e4m3).

But for float32, these are what `not_supported_reasons` of the impls say when layers are loaded.

FLASH_ATTN and TRITON_ATTN can be captured in CUDA graphs of whole steps; xformers takes the sizes of its parts from the host.

Where nothing is chosen, it is FLASH_ATTN if it can run target and head, else TRITON_ATTN: FlashAttention reads a long context
fastest, and the tree's own keys are few. That is reasoning, not measurement.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, AttentionLayer, CommonAttentionMetadata, max_decode_query_len
from vllm.v1.attention.backends.fa_utils import uses_fa4_hd256_kernel
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheSpec, is_quantized_kv_cache

from vllm_eagle.attention.interface import LATENT_BACKEND, window_is_asked
from vllm_eagle.attention.tree_impl import Divided, PrefixBuilder, TreeImpl, TreePass
from vllm_eagle.ops.rows import TreeRows

_WITH_SINKS = ("gpt_oss",)  # types of models
_FP8_MOST = 448.0  # of e4m3, to which vLLM saturates


def register(vllm_config: VllmConfig) -> None:
    """Put our backends in the places of vLLM's, and choose one where the user has not."""
    register_backend(AttentionBackendEnum.FLASH_ATTN, "vllm_eagle.attention.flash.TreeFlashAttentionBackend")
    register_backend(AttentionBackendEnum.TRITON_ATTN, f"{__name__}.{TreeTritonAttentionBackend.__name__}")
    register_backend(AttentionBackendEnum.CUSTOM, "vllm_eagle.attention.xformers.TreeXFormersBackend")
    register_backend(AttentionBackendEnum.TRITON_MLA, "vllm_eagle.attention.mla.TreeMLABackend")
    speculative, is_latent = vllm_config.speculative_config, vllm_config.model_config.use_mla
    chosen = None if is_latent else vllm_config.attention_config.backend
    if chosen is None:  # else support.py has made sure that it is one of these
        chosen = default_backend(vllm_config)
    vllm_config.attention_config.backend = AttentionBackendEnum[LATENT_BACKEND] if is_latent else chosen
    if speculative is not None and speculative.attention_backend is None:  # vLLM would choose another one for the head
        speculative.attention_backend = chosen


def default_backend(vllm_config: VllmConfig) -> AttentionBackendEnum:
    """One that runs here, and takes the tree rows of target and head, or of the head alone beside a target with latent attention:
    else their layers would be refused.
    """
    capability, speculative = current_platform.get_device_capability(), vllm_config.speculative_config
    models = [vllm_config.model_config, *([] if speculative is None else [speculative.draft_model_config])]
    models = [model for model in models if model is not None and not model.use_mla]  # latents have a backend of their own
    flash = (
        capability is not None
        and FlashAttentionBackend.supports_compute_capability(capability)
        and not window_is_asked(vllm_config)
        and not is_quantized_kv_cache(vllm_config.cache_config.cache_dtype)
        and all(_flash_attention_takes(model, vllm_config.model_config.max_model_len) for model in models)
    )
    return AttentionBackendEnum.FLASH_ATTN if flash else AttentionBackendEnum.TRITON_ATTN


def _flash_attention_takes(model: ModelConfig, max_model_len: int) -> bool:
    head_size, window = model.get_head_size(), model.get_sliding_window()
    return (
        model.hf_text_config.model_type not in _WITH_SINKS
        and FlashAttentionBackend.supports_dtype(model.dtype)
        and FlashAttentionBackend.supports_head_size(head_size)
        and not uses_fa4_hd256_kernel(head_size)
        and (window is None or window >= max_model_len)
    )


@dataclass
class DividedOnGPU(Divided):
    """What the GPU's kernels want to know besides, without asking the GPU."""

    num_tree_rows: int = 0
    tree_starts: torch.Tensor | None = None  # [num_trees + 1] int32, where each tree begins


@dataclass
class TreeTritonAttentionMetadata(DividedOnGPU, TritonAttentionMetadata):
    """Of Triton."""


class TreeBuilder(PrefixBuilder):
    """Mixin of vLLM's builders: `attach_prefix` adds the trees of a pass to its metadata."""

    # Passes of decoding requests can be captured as a whole. One with a prompt is divided by sizes that only the host knows.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    metadata_cls: ClassVar[type[Any]]

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> int:
        """Most rows of a request in such a pass, of which it may have fewer: those of the largest tree."""
        return max_decode_query_len(vllm_config)

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> Any:
        """As vLLM's, without trees."""
        built = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        return self.metadata_cls(**vars(built))

    def attach_prefix(self, metadata: Any, trees: TreeRows, query_start_loc_cpu: torch.Tensor, longest_context: int) -> None:
        """As PrefixBuilder's, and where the trees begin."""
        super().attach_prefix(metadata, trees, query_start_loc_cpu, longest_context)
        num_trees = len(trees.context_lens)
        metadata.num_tree_rows = int(query_start_loc_cpu[num_trees])
        metadata.tree_starts = metadata.query_start_loc[: num_trees + 1]


class TreeGPUImpl(TreeImpl):
    """Mixin of vLLM's CUDA attention: tree rows by our kernel."""

    head_size: int
    kv_cache_dtype: str
    sliding_window: tuple[int, int] | None
    logits_soft_cap: float | None
    sinks: torch.Tensor | None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.supports_quant_query_input = False  # tree rows want the query as it is

    def limit_window(self, window: int) -> None:
        """As TreeImpl's; vLLM counts the positions before a row's own."""
        self.sliding_window = (window - 1, 0)

    def attend(self, trees: TreePass) -> None:
        """Tree rows by our kernel alone."""
        from vllm_eagle.ops.tree_attention import tree_attention

        tree_attention(
            trees.query,
            trees.key,
            trees.value,
            self._typed(trees.kv_cache),
            trees.rows,
            self.scale,
            trees.output,
            trees.longest_context,
            soft_cap=float(self.logits_soft_cap or 0.0),
            window=self._window,
            key_scale=trees.layer._k_scale_float,
            value_scale=trees.layer._v_scale_float,
            sinks=self.sinks,
        )

    @property
    def _window(self) -> int:
        """Tokens that a row sees, itself included; 0: all."""
        return self.sliding_window[0] + 1 if self.sliding_window is not None and self.sliding_window[0] >= 0 else 0

    def _typed(self, kv_cache: torch.Tensor) -> torch.Tensor:
        return kv_cache.view(current_platform.fp8_dtype()) if is_quantized_kv_cache(self.kv_cache_dtype) else kv_cache

    def as_cached(self, layer: AttentionLayer, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rounded to the cache's type."""
        if not is_quantized_kv_cache(self.kv_cache_dtype):
            return key, value
        rounded = []
        for x, scale in ((key, layer._k_scale_float), (value, layer._v_scale_float)):
            small = (x.float() / scale).clamp(-_FP8_MOST, _FP8_MOST).to(current_platform.fp8_dtype())
            rounded.append((small.float() * scale).to(x.dtype))
        return rounded[0], rounded[1]

    def not_supported_reasons(self, max_model_len: int) -> list[str]:
        """Why this layer cannot run tree rows; empty if it can."""
        reasons = super().not_supported_reasons(max_model_len)
        if is_quantized_kv_cache(self.kv_cache_dtype) and self.kv_cache_dtype not in ("fp8", "fp8_e4m3"):
            reasons.append(f"kv_cache_dtype={self.kv_cache_dtype} is not read by the tree kernel; use auto or fp8")
        return reasons


class TreeTritonAttentionMetadataBuilder(TreeBuilder, TritonAttentionMetadataBuilder):
    """Of the backend below."""

    metadata_cls = TreeTritonAttentionMetadata


class TreeTritonAttentionImpl(TreeGPUImpl, TritonAttentionImpl):
    """vLLM's Triton attention; tree rows by our kernel."""


class TreeTritonAttentionBackend(TritonAttentionBackend):
    """Registered in place of TRITON_ATTN, whose name it keeps."""

    @staticmethod
    def get_impl_cls() -> type[TreeTritonAttentionImpl]:
        """The implementation above."""
        return TreeTritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeTritonAttentionMetadataBuilder]:
        """The builder above."""
        return TreeTritonAttentionMetadataBuilder
