"""FlashAttention for tree rows: over the context, merged with our kernel over the trees' own keys. Not run on a GPU yet.

What it can and cannot do beside the others: cuda.py.
"""

from dataclasses import dataclass

import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_eagle.attention.cuda import DividedOnGPU, TreeBuilder, TreeGPUImpl
from vllm_eagle.attention.tree_impl import TreePass


@dataclass
class TreeFlashAttentionMetadata(DividedOnGPU, FlashAttentionMetadata):
    """Of a pass."""


class TreeFlashAttentionMetadataBuilder(TreeBuilder, FlashAttentionMetadataBuilder):
    """Of the backend below."""

    metadata_cls = TreeFlashAttentionMetadata


class TreeFlashAttentionImpl(TreeGPUImpl, FlashAttentionImpl):
    """vLLM's FlashAttention; for tree rows its context part, merged with our kernel's part over the tree's own keys."""

    def not_supported_reasons(self, max_model_len: int) -> list[str]:
        """Why this layer cannot run tree rows; empty if it can."""
        reasons = super().not_supported_reasons(max_model_len)
        if 0 < self._window < max_model_len:
            # FlashAttention counts a window from the last row, as if rows were consecutive tokens.
            reasons.append(f"a sliding window of {self._window} tokens; set attention_backend to TRITON_ATTN")
        if self.sinks is not None:  # FlashAttention's part would count them, and ours could not know
            reasons.append("attention sinks; set attention_backend to TRITON_ATTN")
        if is_quantized_kv_cache(self.kv_cache_dtype):  # it wants the query quantized, too; tree rows want it as it is
            reasons.append(f"kv_cache_dtype={self.kv_cache_dtype} with FlashAttention; set attention_backend to TRITON_ATTN")
        if self.fa4_hd256:
            reasons.append("FlashAttention 4 with heads of 256 wants other pages; set attention_backend to TRITON_ATTN")
        return reasons

    def verify(self, trees: TreePass, metadata: TreeFlashAttentionMetadata) -> None:
        """FlashAttention over the context, without a mask, since all rows of a tree see all of it."""
        from vllm.v1.attention.backends.flash_attn import flash_attn_varlen_func
        from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

        from vllm_eagle.ops.tree_attention import own_attention

        rows, query, output = trees.rows, trees.query, trees.output
        assert metadata.tree_starts is not None
        soft_cap = float(self.logits_soft_cap or 0.0)
        num_rows = metadata.num_tree_rows
        # With the window, though it is longer than any context: so both kinds of launches are one variant of the kernel.
        own, suffix_log_sums = own_attention(
            query, trees.key, trees.value, trees.kv_cache, rows, self.scale, metadata.tree_starts, num_rows, soft_cap, self._window
        )
        parts = self._typed(trees.kv_cache).transpose(1, 2).split(self.head_size, dim=-1)
        keys, values = (canonicalize_singleton_dim_strides(x) for x in parts)
        descale = (len(rows.context_lens), trees.key.shape[1])
        context, context_log_sums = flash_attn_varlen_func(
            q=query[:num_rows],
            k=keys,
            v=values,
            cu_seqlens_q=metadata.tree_starts,
            max_seqlen_q=rows.visible.shape[1],
            seqused_k=rows.context_lens.to(torch.int32),
            max_seqlen_k=max(1, trees.longest_context),
            softmax_scale=self.scale,
            causal=False,
            softcap=soft_cap,
            block_table=rows.block_table,
            return_softmax_lse=True,
            num_splits=metadata.max_num_splits,  # in graphs, where its own choice would go by what it sees at capture
            fa_version=self.vllm_flash_attn_version,
            k_descale=trees.layer._k_scale.expand(descale),
            v_descale=trees.layer._v_scale.expand(descale),
        )
        merge_attn_states(output[:num_rows], context, context_log_sums, own.to(query.dtype), suffix_log_sums)


class TreeFlashAttentionBackend(FlashAttentionBackend):
    """Registered in place of FLASH_ATTN, whose name it keeps."""

    supports_kv_cache_update_bypass = False  # (from vLLM 0.33 on) tree rows take their keys as they come, not from the cache

    @staticmethod
    def get_impl_cls() -> type[TreeFlashAttentionImpl]:
        """The implementation above."""
        return TreeFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeFlashAttentionMetadataBuilder]:
        """The builder above."""
        return TreeFlashAttentionMetadataBuilder
