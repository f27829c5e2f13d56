"""vLLM's CPU attention backend, with tree rows.

Rows of a branching tree run through `cpu_kernel`: node i of a tree goes to the slot of position context_len + i in the request's
own block table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_eagle.algorithm.verify import TreeBatch
from vllm_eagle.attention import cpu_cache, cpu_kernel
from vllm_eagle.attention.tree_impl import Divided, PrefixBuilder, TreeImpl, TreePass, tree_rows


@dataclass
class TreeCPUAttentionMetadata(Divided, CPUAttentionMetadata):
    """Of a pass. `plain` is over the whole batch, trees without their context."""


class TreeCPUAttentionBackend(CPUAttentionBackend):
    """Registered in place of CPU_ATTN, whose name it keeps: vLLM's CPU platform knows no other."""

    @staticmethod
    def get_impl_cls() -> type["TreeCPUAttentionImpl"]:
        """The implementation below."""
        return TreeCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type["TreeCPUAttentionMetadataBuilder"]:
        """The builder below."""
        return TreeCPUAttentionMetadataBuilder


class TreeCPUAttentionMetadataBuilder(PrefixBuilder, CPUAttentionMetadataBuilder):
    """Builds vLLM's metadata; `attach` adds the trees of a pass to it."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TreeCPUAttentionMetadata:
        """As vLLM's, without trees."""
        built = super().build(common_prefix_len, common_attn_metadata, fast_build)
        return TreeCPUAttentionMetadata(**vars(built))

    def attach(self, metadata: TreeCPUAttentionMetadata, batch: TreeBatch) -> None:
        """Divide the rows of `metadata` into those of `batch`'s trees and the rest."""
        with_tree = torch.from_numpy(batch.req_indices)
        metadata.trees = tree_rows(batch, metadata.block_table, torch.from_numpy)
        num_reqs = len(metadata.query_start_loc) - 1
        if len(with_tree) == num_reqs:
            return
        # vLLM's kernel wants its rows side by side, and copying them out and back costs more than what it makes of the trees' rows
        # here: each sees those before it as if they were all of its request. These are overwritten.
        seq_lens = metadata.seq_lens[:num_reqs].clone()
        seq_lens[with_tree] = metadata.query_start_loc.diff()[with_tree]
        without_contexts = CommonAttentionMetadata(
            query_start_loc=metadata.query_start_loc,
            query_start_loc_cpu=metadata.query_start_loc,
            seq_lens=seq_lens,
            num_reqs=num_reqs,
            num_actual_tokens=metadata.num_actual_tokens,
            max_query_len=metadata.max_query_len,
            max_seq_len=metadata.max_seq_len,
            block_table_tensor=metadata.block_table[:num_reqs],
            slot_mapping=metadata.slot_mapping,
            causal=metadata.causal,
        )
        metadata.plain = super().build(0, without_contexts)


class TreeCPUAttentionImpl(TreeImpl, CPUAttentionBackendImpl):
    """vLLM's CPU attention, plus verification passes over trees and the head's passes over tree levels."""

    def limit_window(self, window: int) -> None:
        """As TreeImpl's."""
        self.sliding_window = window

    def attend(self, trees: TreePass) -> None:
        """Tree rows by our operator."""
        layout = self._layout(trees.layer, trees.kv_cache)
        cpu_kernel.tree_attention(
            trees.query,
            trees.key,
            trees.value,
            trees.kv_cache,
            layout,
            trees.rows,
            self.scale,
            trees.output,
            soft_cap=float(self.logits_soft_cap),
            window=max(0, self.sliding_window),
            sinks=None if self.sinks is None else self.sinks.float(),
        )

    def move_slots(self, layers: Sequence[AttentionLayer], sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy keys and values of layers like this one from slots to slots, [num_moves] int64 each; none is overwritten unread."""
        kv_caches = [layer.kv_cache for layer in layers]
        cpu_cache.move_slots(kv_caches, self._layout(layers[0], kv_caches[0]), sources, targets)

    def _layout(self, layer: AttentionLayer, kv_cache: torch.Tensor) -> cpu_cache.PackedLayout:
        return cpu_cache.probe_layout(layer.isa, kv_cache.dtype, kv_cache.shape[2], self.head_size)
