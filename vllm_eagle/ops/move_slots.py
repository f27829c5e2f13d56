"""Compact the KV cache on a GPU: the accepted path's keys and values of all layers go to their places in one launch.

Plan and reasons: vllm_eagle/algorithm/compact.py. Here nothing is planned on the host: paths come from the walk and stay on the
GPU. One program moves all tokens of one request, layer and head, going down the path. A node never lies below its depth and nodes
rise along a path, so no token is overwritten before it was read, and programs share no byte.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_WORD = torch.int32  # what is copied at a time


# Not specialized on what changes from step to step: that would compile while requests wait.
@triton.jit(do_not_specialize=["table_row", "path_row", "max_depth"])
def _move(
    caches, block_table, context_lens, paths,
    table_row, path_row, cache_block, cache_head, cache_slot, max_depth, words, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer, request, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cache = tl.load(caches + layer).to(tl.pointer_type(tl.int32)) + head.to(tl.int64) * cache_head
    context_len = tl.load(context_lens + request)
    word = tl.arange(0, BLOCK)
    for depth in range(1, max_depth + 1):
        node = tl.load(paths + request * path_row + depth - 1)
        if node > depth:  # 0 is the end of the path
            source, target = context_len + node, context_len + depth
            source_block = tl.load(block_table + request * table_row + source // PAGE).to(tl.int64)
            target_block = tl.load(block_table + request * table_row + target // PAGE).to(tl.int64)
            source_at = cache + source_block * cache_block + (source % PAGE) * cache_slot
            target_at = cache + target_block * cache_block + (target % PAGE) * cache_slot
            tl.store(target_at + word, tl.load(source_at + word, mask=word < words), mask=word < words)


@dataclass(frozen=True, slots=True)
class Caches:
    """KV caches of layers that have one shape, layout and type, prepared once."""

    addresses: torch.Tensor  # [num_layers] int64, on the GPU
    num_kv_heads: int
    block_size: int
    words: int  # of a token and head, of 4 bytes
    strides: tuple[int, int, int]  # of blocks, heads and slots, in words
    tensors: tuple[torch.Tensor, ...]  # kept alive

    @classmethod
    def of(cls, kv_caches: Sequence[torch.Tensor]) -> "Caches":
        """From tensors [num_blocks, num_kv_heads, block_size, content]; layers that share a cache are taken once.

        Raises:
            ValueError: they differ, or a token's content is not a whole number of words in one piece.
        """
        unique = tuple({cache.data_ptr(): cache for cache in kv_caches}.values())
        first = unique[0]
        for cache in unique:
            if (cache.shape, cache.stride(), cache.dtype) != (first.shape, first.stride(), first.dtype):
                raise ValueError(
                    f"KV caches differ: {cache.shape} with strides {cache.stride()} of {cache.dtype}, and {first.shape}"
                )
        per_word = _WORD.itemsize // first.dtype.itemsize
        if first.stride(-1) != 1 or any(n % per_word for n in (first.shape[-1], *first.stride()[:-1])):
            raise ValueError(
                f"KV cache of shape {first.shape} with strides {first.stride()}: tokens are not whole words in one piece"
            )
        blocks, heads, slots = (stride // per_word for stride in first.stride()[:3])
        addresses = torch.tensor([cache.data_ptr() for cache in unique], dtype=torch.int64).to(first.device)
        return cls(addresses, first.shape[1], first.shape[2], first.shape[3] // per_word, (blocks, heads, slots), unique)


def move_accepted(
    caches: Caches,
    block_table: torch.Tensor,  # [num_reqs, max_blocks] int32
    context_lens: torch.Tensor,  # [num_reqs] int64, tokens before the root
    paths: torch.Tensor,  # [num_reqs, max_depth] int32, accepted nodes, root left out, then zeros
) -> None:
    """Move the token of the node at each depth to the slot of position `context_len + depth`. Equals `reference`."""
    if paths.numel() == 0:
        return
    _move[(len(caches.addresses), len(paths), caches.num_kv_heads)](
        caches.addresses, block_table, context_lens, paths,
        block_table.stride(0), paths.stride(0), *caches.strides, paths.shape[1], caches.words,
        PAGE=caches.block_size, BLOCK=triton.next_power_of_2(caches.words), num_warps=1,
    )  # fmt: skip


def reference(
    kv_caches: Sequence[torch.Tensor], block_table: torch.Tensor, context_lens: torch.Tensor, paths: torch.Tensor
) -> None:
    """The same, token by token."""
    block_size = kv_caches[0].shape[2]
    for cache in {cache.data_ptr(): cache for cache in kv_caches}.values():
        before = cache.clone()
        for table, context_len, path in zip(block_table.tolist(), context_lens.tolist(), paths.tolist(), strict=True):
            for depth, node in enumerate(path, start=1):
                if node > 0:
                    source, target = context_len + node, context_len + depth
                    token = before[table[source // block_size], :, source % block_size]
                    cache[table[target // block_size], :, target % block_size] = token
