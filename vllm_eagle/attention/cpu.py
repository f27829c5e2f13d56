"""vLLM's CPU attention backend, with tree rows.

Requests without a tree, or with a mere chain, run through vLLM's own kernel, rows of a branching tree through `cpu_kernel`. Keys
and values are written by vLLM as always: node i of a tree goes to the slot of position context_len + i in the request's own block
table.
"""

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionLayer, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_eagle.attention import cpu_cache, cpu_kernel
from vllm_eagle.draft import Level
from vllm_eagle.verify import TreeBatch


@dataclass
class TreeCPUAttentionMetadata(CPUAttentionMetadata):
    """vLLM's metadata and, in a pass that verifies trees, how its rows divide."""

    trees: tuple[cpu_kernel.Context, cpu_kernel.TreeRows] | None = None  # of the requests that have one; None: no tree in this pass
    plain: CPUAttentionMetadata | None = None  # the requests without a tree, as a batch of their own; None: there are none
    plain_rows: torch.Tensor | None = None  # [num_plain_tokens] int64


class DraftLevels:
    """Metadata of the head's passes over tree levels: one context per request, keys and values of the nodes so far.

    The nodes' keys and values are scratch: the next step's first pass computes those of accepted tokens anew from the target's
    true features. Rows of earlier levels are attended again with each level, which costs less than a second kernel would.
    """

    def __init__(self, block_table: torch.Tensor, context_lens: torch.Tensor, block_size: int, most_rows: int):
        self.context = cpu_kernel.Context.of(block_table, context_lens, block_size, most_rows)
        self.width = 0  # rows per request of the newest level
        self.tree_rows: cpu_kernel.TreeRows | None = None
        self._contexts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rows: dict[str, list[torch.Tensor]] = {}  # query, key, value: [num_reqs, rows so far, heads, head_dim]

    def start(self, level: Level) -> None:
        """Announce the rows of the next pass."""
        num_reqs, self.width, num_rows = level.ancestors.shape
        before = num_rows - self.width
        square = torch.zeros(num_reqs, num_rows, num_rows, dtype=torch.bool)
        if self.tree_rows is not None:
            square[:, :before, :before] = self.tree_rows.ancestors
        square[:, before:] = level.ancestors
        first_rows = torch.arange(num_reqs) * num_rows
        self.tree_rows = cpu_kernel.TreeRows(first_rows, torch.full_like(first_rows, num_rows), square)

    def context_of(
        self, layer_name: str, kv_cache: torch.Tensor, layout: cpu_cache.PackedLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The context's keys and values, read from the cache once per step."""
        if layer_name not in self._contexts:
            self._contexts[layer_name] = cpu_cache.read_blocks(kv_cache, layout, self.context.blocks)
        return self._contexts[layer_name]

    def add_rows(self, layer_name: str, new: list[torch.Tensor]) -> list[torch.Tensor]:
        """Append query, key and value [num_reqs * width, heads, head_dim]; returns those of all levels."""
        new = [x.unflatten(0, (-1, self.width)) for x in new]
        if layer_name in self._rows:
            new = [torch.cat(pair, dim=1) for pair in zip(self._rows[layer_name], new, strict=True)]
        self._rows[layer_name] = new
        return new


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
        context = cpu_kernel.Context.of(
            metadata.block_table[with_tree],
            torch.from_numpy(batch.context_lens),
            self.block_size,
            most_rows=batch.depths.shape[1],
        )
        rows = cpu_kernel.TreeRows(
            torch.from_numpy(batch.first_rows), torch.from_numpy(batch.num_nodes), torch.from_numpy(batch.ancestors)
        )
        metadata.trees = context, rows
        query_lens = metadata.query_start_loc.diff()
        is_plain = torch.ones(len(query_lens), dtype=torch.bool)
        is_plain[with_tree] = False
        if is_plain.any():
            metadata.plain_rows = torch.repeat_interleave(is_plain, query_lens).nonzero()[:, 0]
            metadata.plain = super().build(0, _subset(metadata, is_plain, query_lens))


def _subset(metadata: CPUAttentionMetadata, chosen: torch.Tensor, query_lens: torch.Tensor) -> CommonAttentionMetadata:
    """The chosen requests of a batch as a batch of their own, as far as the CPU builder looks."""
    lens = query_lens[chosen]
    query_start_loc = torch.cat([lens.new_zeros(1), lens.cumsum(0)]).to(torch.int32)
    seq_lens = metadata.seq_lens[: len(chosen)][chosen]
    return CommonAttentionMetadata(
        query_start_loc=query_start_loc,
        query_start_loc_cpu=query_start_loc,
        seq_lens=seq_lens,
        num_reqs=len(lens),
        num_actual_tokens=int(lens.sum()),
        max_query_len=int(lens.max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=metadata.block_table[: len(chosen)][chosen],
        slot_mapping=metadata.slot_mapping,
        causal=metadata.causal,
    )


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
        context, tree_rows = attn_metadata.trees
        context_key, context_value = cpu_cache.read_blocks(kv_cache, self._layout(layer, kv_cache), context.blocks)
        cpu_kernel.tree_attention(query, key, value, context_key, context_value, context, tree_rows, self.scale, output)
        if attn_metadata.plain is not None:
            rows = attn_metadata.plain_rows
            plain_output = torch.empty_like(output[rows])
            super().forward(layer, query[rows], key[rows], value[rows], kv_cache, attn_metadata.plain, plain_output)
            output[rows] = plain_output
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
        assert levels.tree_rows is not None
        num_new = levels.tree_rows.ancestors.shape[0] * levels.width
        name = layer.layer_name
        context_key, context_value = levels.context_of(name, kv_cache, self._layout(layer, kv_cache))
        rows = levels.add_rows(name, [query[:num_new], key[:num_new], value[:num_new]])
        queries, keys, values = (x.flatten(0, 1) for x in rows)
        attended = torch.empty_like(queries)
        cpu_kernel.tree_attention(
            queries, keys, values, context_key, context_value, levels.context, levels.tree_rows, self.scale, attended
        )
        attended = attended.view_as(rows[0])
        output[:num_new] = attended[:, -levels.width :].flatten(0, 1)
        return output

    def move_slots(self, layer: AttentionLayer, kv_cache: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy keys and values from slots to slots, [num_moves] int64 each; all are read before any is written."""
        key, value = cpu_cache.read_slots(kv_cache, self._layout(layer, kv_cache), sources)
        self.do_kv_cache_update(layer, key, value, kv_cache, targets)

    def _layout(self, layer: AttentionLayer, kv_cache: torch.Tensor) -> cpu_cache.PackedLayout:
        return cpu_cache.probe_layout(layer.isa, kv_cache.dtype, kv_cache.shape[2], self.head_size)
