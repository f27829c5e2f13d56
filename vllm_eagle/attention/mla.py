"""vLLM's Triton attention over latents (MLA: DeepSeek-V2 and V3, Kimi K2) with tree rows. Not run on a GPU yet.

vLLM divides a pass: requests with at most as many rows as the largest tree has are decoded in the absorbed form, over the latents
themselves; prompts multiply the latents out and are attended as usual. Trees are of the first kind, and come first. What is decoded
besides are roots alone, one row each, for vLLM's own kernel, and short ends of prompts beside them, which are chains to ours.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.mla_attention import MLACommonDecodeMetadata, MLACommonMetadata, QueryLenSupport
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata, max_decode_query_len
from vllm.v1.attention.backends.mla.triton_mla import TritonMLABackend, TritonMLAImpl, TritonMLAMetadataBuilder
from vllm.v1.kv_cache_interface import KVCacheSpec, is_quantized_kv_cache

from vllm_eagle.attention.tree_impl import TreePass
from vllm_eagle.ops.rows import TreeRows


@dataclass
class TreeMLAMetadata(MLACommonMetadata[MLACommonDecodeMetadata]):
    """Of a pass."""

    block_table: torch.Tensor | None = None  # [num_reqs, max_blocks] int32
    max_decode_rows: int = 1  # of a request that is decoded; known on the host
    trees: TreeRows | None = None  # of the first requests; None: no tree in this pass
    num_tree_rows: int = 0
    longest_context: int = 0  # at least that of any tree
    others: "TreeMLAMetadata | None" = None  # what is decoded besides trees; None: nothing


class TreeMLAMetadataBuilder(TritonMLAMetadataBuilder):
    """vLLM's; what is decoded may have any number of rows."""

    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.metadata_cls = TreeMLAMetadata

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> int:
        """Most rows of a request in a pass that is captured as a whole, of which it may have fewer: those of the largest tree."""
        return max_decode_query_len(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TreeMLAMetadata:
        """As vLLM's, without trees."""
        found = super().build(common_prefix_len, common_attn_metadata, fast_build)
        assert isinstance(found, TreeMLAMetadata)
        found.block_table = common_attn_metadata.block_table_tensor
        found.max_decode_rows = _most_rows(common_attn_metadata.query_start_loc_cpu[: found.num_decodes + 1])
        return found

    def attach_prefix(
        self,
        metadata: TreeMLAMetadata,
        trees: TreeRows,  # of the first requests
        query_start_loc_cpu: torch.Tensor,  # [num_reqs + 1] int32, of the batch, on the host
        longest_context: int,
    ) -> None:
        """Divide what is decoded into `trees` and the rest. Nothing is read back from the device."""
        num_trees = len(trees.context_lens)
        metadata.trees, metadata.longest_context = trees, longest_context
        metadata.num_tree_rows = int(query_start_loc_cpu[num_trees])
        rest = slice(num_trees, metadata.num_decodes)
        decode, starts = metadata.decode, query_start_loc_cpu[num_trees : metadata.num_decodes + 1]
        if decode is None or rest.stop <= rest.start:
            return
        others: dict[str, Any] = {
            "trees": None,
            "query_start_loc": metadata.query_start_loc[num_trees:] - metadata.query_start_loc[num_trees],
            "slot_mapping": metadata.slot_mapping[metadata.num_tree_rows :],
            "num_decodes": rest.stop - rest.start,
            "num_decode_tokens": metadata.num_decode_tokens - metadata.num_tree_rows,
            "decode": replace(decode, block_table=decode.block_table[rest], seq_lens=decode.seq_lens[rest]),
            "max_decode_rows": _most_rows(starts),
        }
        metadata.others = replace(metadata, **others)


def _most_rows(starts: torch.Tensor) -> int:
    """Of any request; `starts` [num_reqs + 1] is where each one's rows begin."""
    return int(starts.diff().max()) if len(starts) > 1 else 0


class TreeMLAImpl(TritonMLAImpl):
    """vLLM's; tree rows by our kernel."""

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],  # [num_decode_tokens, num_heads, rank + rope_dim], or these two apart
        kv_c_and_k_pe_cache: torch.Tensor,  # [num_blocks, block_size, rank + rope_dim]
        attn_metadata: TreeMLAMetadata,
        layer: AttentionLayer,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As vLLM's: [num_decode_tokens, num_heads, rank]. What this pass decodes is in the cache already."""
        metadata = attn_metadata
        if metadata.trees is None and metadata.max_decode_rows <= 1:
            return super().forward_mqa(q, kv_c_and_k_pe_cache, metadata, layer)
        query = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
        if metadata.trees is None:
            return self._attend(layer, query, kv_c_and_k_pe_cache, metadata, _chains(metadata), metadata.max_seq_len), None
        found = self._attend(layer, query, kv_c_and_k_pe_cache, metadata, metadata.trees, metadata.longest_context)
        if metadata.others is not None:
            rest = slice(metadata.num_tree_rows, metadata.num_decode_tokens)
            found[rest] = self.forward_mqa(query[rest], kv_c_and_k_pe_cache, metadata.others, layer)[0]
        return found, None

    def _attend(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        cache: torch.Tensor,
        metadata: TreeMLAMetadata,
        rows: TreeRows,
        longest_context: int,
    ) -> torch.Tensor:
        """Tree rows; the others are zero. A tree's own latents are taken from the cache, where vLLM has put them."""
        slots, page = metadata.slot_mapping[: len(query)], cache.shape[1]
        latent = cache[slots // page, slots % page].to(query.dtype)[:, None]
        output = query.new_zeros(*query.shape[:2], self.kv_lora_rank)  # padding's rows too: what stands there chooses experts
        self.attend(TreePass(layer, query, latent, latent, cache, rows, longest_context, output))
        return output

    def attend(self, trees: TreePass) -> None:
        """Tree rows by our kernel; keys are latents, which are values as well, and of the output the first `rank` numbers count."""
        from vllm_eagle.ops.latent_tree_attention import latent_tree_attention

        output = trees.output[..., : self.kv_lora_rank]
        latent_tree_attention(trees.query, trees.key[:, 0], trees.kv_cache, trees.rows, self.scale, output, trees.longest_context)

    def not_supported_reasons(self, max_model_len: int) -> list[str]:
        """Why this layer cannot run tree rows; empty if it can."""
        if is_quantized_kv_cache(self.kv_cache_dtype):
            return [f"kv_cache_dtype={self.kv_cache_dtype} is not read by the tree kernel over latents; use auto"]
        return []


def _chains(metadata: TreeMLAMetadata) -> TreeRows:
    """Rows of requests that are decoded, as trees without branches.

    Made in the pass itself: in a CUDA graph, of what stands in the batch's tensors when it is replayed.
    """
    decode = metadata.decode
    assert decode is not None
    starts = metadata.query_start_loc[: metadata.num_decodes + 1].long()
    first_rows, num_rows, most = starts[:-1], starts.diff(), metadata.max_decode_rows
    visible = torch.ones(most, most, dtype=torch.bool, device=starts.device).tril().expand(len(num_rows), -1, -1)
    context_lens = (decode.seq_lens.long() - num_rows).clamp(min=0)
    return TreeRows(decode.block_table, context_lens, first_rows, num_rows, first_rows, num_rows, visible)


class TreeMLABackend(TritonMLABackend):
    """Registered in place of TRITON_MLA, whose name it keeps."""

    @staticmethod
    def get_impl_cls() -> type[TreeMLAImpl]:
        """The implementation above."""
        return TreeMLAImpl

    @staticmethod
    def get_builder_cls() -> type[TreeMLAMetadataBuilder]:
        """The builder above."""
        return TreeMLAMetadataBuilder
