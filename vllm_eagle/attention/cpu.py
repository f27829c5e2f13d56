"""vLLM's CPU attention backend, with tree rows.

Requests without a tree, or with a mere chain, run through vLLM's own kernel, rows of a branching tree through `cpu_kernel`. Keys
and values are written by vLLM as always: node i of a tree goes to the slot of position context_len + i in the request's own block
table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionLayer, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_eagle.algorithm.verify import TreeBatch
from vllm_eagle.attention import cpu_cache, cpu_kernel
from vllm_eagle.attention.levels import DraftLevels
from vllm_eagle.ops.rows import TreeRows


@dataclass
class TreeCPUAttentionMetadata(CPUAttentionMetadata):
    """vLLM's metadata and, in a pass that verifies trees, how its rows divide."""

    trees: TreeRows | None = None  # of the requests that have one; None: no tree in this pass
    plain: CPUAttentionMetadata | None = None  # of the whole batch, trees without their context; None: every request has a tree


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


class TreeCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
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
        first_rows, num_rows = torch.from_numpy(batch.first_rows), torch.from_numpy(batch.num_nodes)
        metadata.trees = TreeRows(
            metadata.block_table[with_tree],
            torch.from_numpy(batch.context_lens),
            first_rows,
            num_rows,
            first_keys=first_rows,
            num_keys=num_rows,
            visible=torch.from_numpy(batch.ancestors),
        )
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


class TreeCPUAttentionImpl(CPUAttentionBackendImpl):
    """vLLM's CPU attention, plus verification passes over trees and the head's passes over tree levels."""

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TreeCPUAttentionMetadata | DraftLevels | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As CPUAttentionBackendImpl.forward; shapes as there."""
        if isinstance(attn_metadata, DraftLevels):
            return self._draft(layer, query, key, value, kv_cache, attn_metadata, output)
        if attn_metadata is None or attn_metadata.trees is None:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        if attn_metadata.plain is not None:
            super().forward(layer, query, key, value, kv_cache, attn_metadata.plain, output)
        layout = self._layout(layer, kv_cache)
        cpu_kernel.tree_attention(query, key, value, kv_cache, layout, attn_metadata.trees, self.scale, output)
        return output

    def not_supported_reasons(self, max_model_len: int) -> list[str]:
        """Why this layer cannot run tree rows; empty if it can."""
        reasons = []
        if self.attn_type != AttentionType.DECODER:
            reasons.append(f"attention of type {self.attn_type} is not causal self-attention")
        if self.alibi_slopes is not None:
            reasons.append("ALiBi goes by cache slot, tree positions do not")
        if self.sinks is not None:
            reasons.append("the CPU tree kernel knows no attention sinks")
        if self.logits_soft_cap:
            reasons.append("the CPU tree kernel does not soft-cap scores")
        if 0 < self.sliding_window < max_model_len:
            reasons.append(f"a sliding window of {self.sliding_window} tokens; set max_model_len to at most that")
        return reasons

    def _draft(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        levels: DraftLevels,
        output: torch.Tensor,
    ) -> torch.Tensor:
        keys, values = levels.add(layer.layer_name, key, value)
        cpu_kernel.tree_attention(query, keys, values, kv_cache, self._layout(layer, kv_cache), levels.rows, self.scale, output)
        return output

    def move_slots(self, layers: Sequence[AttentionLayer], sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy keys and values of layers like this one from slots to slots, [num_moves] int64 each; none is overwritten unread."""
        kv_caches = [layer.kv_cache for layer in layers]
        cpu_cache.move_slots(kv_caches, self._layout(layers[0], kv_caches[0]), sources, targets)

    def _layout(self, layer: AttentionLayer, kv_cache: torch.Tensor) -> cpu_cache.PackedLayout:
        return cpu_cache.probe_layout(layer.isa, kv_cache.dtype, kv_cache.shape[2], self.head_size)
