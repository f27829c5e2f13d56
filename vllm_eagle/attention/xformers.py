"""xformers for tree rows, as vLLM's backend `CUSTOM`, the name that vLLM leaves to plugins. Not run on a GPU yet.

Everything else, plain requests and the writing of keys and values, is vLLM's FlashAttention. xformers can do less than the other
two backends (`not_supported_reasons`) and pads all trees to the largest: an alternative, never the default.
"""

from importlib.util import find_spec

from vllm.v1.attention.backend import AttentionCGSupport, MultipleOf
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_eagle.attention.cuda import TreeGPUImpl
from vllm_eagle.attention.flash import TreeFlashAttentionBackend, TreeFlashAttentionMetadataBuilder
from vllm_eagle.attention.tree_impl import TreePass


class TreeXFormersMetadataBuilder(TreeFlashAttentionMetadataBuilder):
    """Of the backend below. xformers takes the sizes of its parts from the host, so no pass can be captured as a whole."""

    _cudagraph_support = AttentionCGSupport.NEVER


class TreeXFormersImpl(TreeGPUImpl, FlashAttentionImpl):
    """vLLM's FlashAttention; tree rows by xformers."""

    def not_supported_reasons(self, max_model_len: int) -> list[str]:
        """Why this layer cannot run tree rows; empty if it can."""
        reasons = super().not_supported_reasons(max_model_len)
        if find_spec("xformers") is None:
            return [*reasons, "xformers is not installed: pip install xformers"]
        from vllm_eagle.ops.xformers_attention import HEAD_DIMS

        if self.head_size not in HEAD_DIMS:
            reasons.append(f"heads of {self.head_size}: xformers knows {HEAD_DIMS}")
        if self.sinks is not None:
            reasons.append("xformers knows no attention sinks")
        if self.logits_soft_cap:
            reasons.append("xformers does not soft-cap scores")
        if 0 < self._window < max_model_len:
            reasons.append(f"a sliding window of {self._window} tokens, which xformers would count by row")
        if self.fa4_hd256:
            reasons.append("FlashAttention 4 with heads of 256 wants other pages for the rows of no tree")
        if self.kv_cache_dtype != "auto":
            reasons.append(f"kv_cache_dtype={self.kv_cache_dtype}: xformers reads the model's type, or wants scales per token")
        return [f"{reason}; choose attention_backend TRITON_ATTN" for reason in reasons]

    def attend(self, trees: TreePass) -> None:
        """Tree rows by xformers."""
        from vllm_eagle.ops.xformers_attention import tree_attention

        tree_attention(
            trees.query, trees.key, trees.value, trees.kv_cache, trees.rows, self.scale, trees.output, trees.longest_context
        )


class TreeXFormersBackend(TreeFlashAttentionBackend):
    """Registered as CUSTOM."""

    @staticmethod
    def get_name() -> str:
        """Its name in vLLM's registry."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[TreeXFormersImpl]:
        """The implementation above."""
        return TreeXFormersImpl

    @staticmethod
    def get_builder_cls() -> type[TreeXFormersMetadataBuilder]:
        """The builder above."""
        return TreeXFormersMetadataBuilder

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        """As xformers' split kernel wants it."""
        return [MultipleOf(64)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """At least the smallest."""
        return max(64, default_block_size)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Token by token within a block, so that blocks and slots are one dimension."""
        return (KVCacheLayout.LBNHC,)
