"""What attention with tree rows does alike in every backend: which rows go where. How tree rows are attended is each backend's own.

Requests without a tree, and chains, run through vLLM's own kernel as always. Keys and values are written by vLLM.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionLayer, AttentionType, CommonAttentionMetadata

from vllm_eagle.algorithm.verify import TreeBatch
from vllm_eagle.attention.levels import DraftLevels
from vllm_eagle.ops.rows import TreeRows


@dataclass(slots=True, eq=False)
class TreePass:
    """Tree rows of one layer in one pass, and where they are answered. Shapes as in vLLM's `forward`."""

    layer: AttentionLayer
    query: torch.Tensor  # [num_tokens, num_heads, head_dim]
    key: torch.Tensor  # [num_tree_keys, num_kv_heads, head_dim], of the trees' own nodes
    value: torch.Tensor  # likewise
    kv_cache: torch.Tensor
    rows: TreeRows
    longest_context: int  # at least that of any tree
    output: torch.Tensor  # [num_tokens, num_heads, head_dim], only the trees' rows are written


@dataclass
class Divided:
    """How the rows of a pass that verifies trees divide; in addition to vLLM's metadata."""

    trees: TreeRows | None = None  # None: no tree in this pass
    longest_context: int = 0  # at least that of any tree
    plain: Any = None  # vLLM's metadata of the requests without a tree; None: there are none
    # [num_plain_rows] int64, or a slice: rows that are a batch of their own; None: `plain` is over all rows, in place
    plain_rows: torch.Tensor | slice | None = None


def tree_rows(batch: TreeBatch, block_table: torch.Tensor, sent: Callable[[Any], torch.Tensor]) -> TreeRows:
    """Of a verification pass, in which a tree's keys are its rows. `sent` takes numpy arrays to the device."""
    first_rows, num_rows = sent(batch.first_rows), sent(batch.num_nodes)
    return TreeRows(
        block_table[sent(batch.req_indices)],
        sent(batch.context_lens),
        first_rows,
        num_rows,
        first_keys=first_rows,
        num_keys=num_rows,
        visible=sent(batch.ancestors),
    )


class PrefixBuilder:
    """Mixin of vLLM's builders, for batches that begin with the requests that have trees, as in vLLM's V2 runner."""

    def attach_prefix(
        self,
        metadata: Any,
        trees: TreeRows,  # of the first requests
        query_start_loc_cpu: torch.Tensor,  # [num_reqs + 1] int32, of the batch, on the host
        longest_context: int,
    ) -> None:
        """Divide the rows of `metadata` into those of `trees` and the rest. Nothing is read back from the device."""
        num_trees = len(trees.context_lens)
        metadata.trees, metadata.longest_context = trees, longest_context
        num_tree_rows = int(query_start_loc_cpu[num_trees])
        starts = query_start_loc_cpu[num_trees:] - num_tree_rows
        num_rest = len(starts) - 1
        if not num_rest:
            return
        rest = slice(num_trees, num_trees + num_rest)
        metadata.plain_rows = slice(num_tree_rows, num_tree_rows + int(starts[-1]))
        without_trees = CommonAttentionMetadata(
            query_start_loc=async_tensor_h2d(starts, device=metadata.slot_mapping.device),
            query_start_loc_cpu=starts,
            seq_lens=metadata.seq_lens[rest],
            num_reqs=num_rest,
            num_actual_tokens=int(starts[-1]),
            max_query_len=int(starts.diff().max()),
            max_seq_len=metadata.max_seq_len,
            block_table_tensor=metadata.block_table[rest],
            slot_mapping=metadata.slot_mapping[metadata.plain_rows],
            causal=metadata.causal,
        )
        # Fast: without FlashAttention 3's schedule, which would overwrite that of the whole batch, for the head's first pass.
        metadata.plain = super().build(0, without_trees, fast_build=True)  # type: ignore[misc]


class TreeImpl:
    """Mixin of vLLM's attention: verification passes over trees and the head's passes over tree levels."""

    scale: float
    attn_type: str
    alibi_slopes: Any

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As vLLM's; shapes as there."""
        plain = super().forward  # type: ignore[misc]
        if isinstance(attn_metadata, DraftLevels):
            own = attn_metadata.add(layer.layer_name, key, value)
            self.attend(TreePass(layer, query, *own, kv_cache, attn_metadata.rows, attn_metadata.longest_context, output))
            return output
        if attn_metadata is None:
            # A pass that is measured. vLLM leaves the output as it is, and what stands there by chance would choose the experts.
            output.zero_()
        if attn_metadata is None or attn_metadata.trees is None:
            return plain(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        assert output_scale is None and output_block_scale is None, "`fused_output_quant_supported` says so"  # noqa: PT018
        rows = attn_metadata.plain_rows
        if attn_metadata.plain is not None and rows is None:
            plain(layer, query, key, value, kv_cache, attn_metadata.plain, output)
        elif attn_metadata.plain is not None:
            own_output = torch.empty_like(output[rows])
            plain(layer, query[rows], key[rows], value[rows], kv_cache, attn_metadata.plain, own_output)
            output[rows] = own_output
        cached = self.as_cached(layer, key, value)
        trees, longest = attn_metadata.trees, attn_metadata.longest_context
        self.verify(TreePass(layer, query, *cached, kv_cache, trees, longest, output), attn_metadata)
        return output

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Tree rows are written in the model's type: vLLM may not leave it to attention to quantize them."""
        return False

    def limit_window(self, window: int) -> None:
        """Let each row see the newest `window` positions only, its own included. The cache keeps all of them, as it would without.

        To be called before vLLM builds the metadata of such layers for the first time, which goes by their window.
        """
        raise NotImplementedError

    def attend(self, trees: TreePass) -> None:
        """Tree rows, of nodes to verify or of a level."""
        raise NotImplementedError

    def verify(self, trees: TreePass, metadata: Any) -> None:
        """Tree rows of a verification pass, whose metadata `attach` has completed."""
        self.attend(trees)

    def as_cached(self, layer: AttentionLayer, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as plain decoding would read them back from the cache."""
        return key, value

    def not_supported_reasons(self, max_model_len: int) -> list[str]:
        """Why this layer cannot run tree rows; empty if it can."""
        reasons = []
        if self.attn_type != AttentionType.DECODER:
            reasons.append(f"attention of type {self.attn_type} is not causal self-attention")
        if self.alibi_slopes is not None:
            reasons.append("ALiBi goes by cache slot, tree positions do not")
        return reasons
