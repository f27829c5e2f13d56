"""Read and move single tokens in vLLM's packed CPU KV cache.

vLLM's CPU kernels pack a block for the instruction set at hand (`isa`): keys transposed for AVX-512, in pairs for AMX, and so
on. vLLM's own op writes new tokens; for the rest the layout is not guessed but probed: one block is written with known values and
read back, which gives the offset of every (token, channel). A new packing in a new wheel is thus followed, not broken.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import torch
from vllm import _custom_ops as ops

from vllm_eagle import native


class Packing(IntEnum):
    """Packings that the C++ operator reads as runs; as in native/tile.h."""

    BY_OFFSET = 0  # none of those below
    BY_ROW = 1  # keys [head_dim, block_size], values [block_size, head_dim]
    BY_PAIR = 2  # keys in pairs of channels for 16 tokens, values in pairs of tokens for 16 channels: bfloat16 for AMX


@dataclass(frozen=True, slots=True, eq=False)
class PackedLayout:
    """Offsets inside the keys (or values) of one block and head: block_size * head_dim numbers; and the name of what they tell."""

    key_offsets: torch.Tensor  # [block_size, head_dim] int32
    value_offsets: torch.Tensor  # [block_size, head_dim] int32
    packing: Packing


@cache
def probe_layout(isa: str, dtype: torch.dtype, block_size: int, head_dim: int) -> PackedLayout:
    """Find the layout by writing every token's index, then every channel's, and reading the raw block.

    Raises:
        RuntimeError: the packing is no permutation of tokens and channels, so single tokens cannot be read.
    """
    offsets = []
    tokens, channels = _probe(isa, dtype, block_size, head_dim)
    for token_at, channel_at in zip(tokens, channels, strict=True):
        table = torch.full((block_size, head_dim), -1, dtype=torch.long)
        table[token_at, channel_at] = torch.arange(block_size * head_dim)
        if (table < 0).any():
            raise RuntimeError(f"vLLM packs the CPU KV cache for isa={isa!r} in an unknown way; use --dtype float32 or report it")
        offsets.append(table)
    return PackedLayout(offsets[0].int(), offsets[1].int(), _packing(offsets[0], offsets[1], dtype))


def _packing(key_offsets: torch.Tensor, value_offsets: torch.Tensor, dtype: torch.dtype) -> Packing:
    block_size, head_dim = key_offsets.shape
    plain = torch.arange(block_size * head_dim)
    if torch.equal(key_offsets, plain.view(head_dim, block_size).t()) and torch.equal(
        value_offsets, plain.view(block_size, head_dim)
    ):
        return Packing.BY_ROW
    if dtype == torch.bfloat16 and block_size % 16 == 0 and head_dim % 16 == 0:
        keys = plain.view(block_size // 16, head_dim // 2, 16, 2).permute(0, 2, 1, 3).reshape(block_size, head_dim)
        values = plain.view(head_dim // 16, block_size // 2, 16, 2).permute(1, 3, 0, 2).reshape(block_size, head_dim)
        if torch.equal(key_offsets, keys) and torch.equal(value_offsets, values):
            return Packing.BY_PAIR
    return Packing.BY_OFFSET


def _probe(isa: str, dtype: torch.dtype, block_size: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and channel found at every offset of keys and values: two [2, block_size * head_dim] int64."""
    found = []
    shape = (block_size, 1, head_dim)
    for axis_size, axis in ((block_size, 0), (head_dim, 2)):
        index = torch.arange(axis_size).view([-1 if a == axis else 1 for a in range(3)]).expand(shape)
        digits = []  # base 64: bfloat16 holds integers up to 256 exactly
        for digit in (index % 64, index // 64):
            data = digit.to(dtype).contiguous()
            cache_block = torch.zeros(1, 1, block_size, 2 * head_dim, dtype=dtype)
            key_cache, value_cache = split_block(cache_block)
            ops.cpu_attn_reshape_and_cache(data, data, key_cache, value_cache, torch.arange(block_size), isa)
            digits.append(cache_block.view(2, block_size * head_dim).long())
        found.append(digits[0] + 64 * digits[1])
    return found[0], found[1]


def split_block(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as vLLM's CPU ops take them: two views [num_blocks, num_kv_heads, block_size, head_dim]."""
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    key_cache, value_cache = kv_cache.view(num_blocks, num_kv_heads, block_size * 2, -1).chunk(2, dim=2)
    return key_cache, value_cache


def read_blocks(
    kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_dim], vLLM's logical view
    layout: PackedLayout,
    blocks: torch.Tensor,  # [num_read] int64
) -> tuple[torch.Tensor, torch.Tensor]:  # keys and values, [num_read * block_size, num_kv_heads, head_dim]
    """Copy whole blocks out, token after token."""
    num_blocks, num_kv_heads, block_size, width = kv_cache.shape
    head_dim = width // 2
    packed = kv_cache.view(num_blocks, num_kv_heads, 2, block_size * head_dim)
    out = kv_cache.new_empty(2, len(blocks), block_size, num_kv_heads, head_dim)
    keys, values = packed[blocks, :, 0], packed[blocks, :, 1]
    if layout.packing == Packing.BY_ROW:
        out[0].copy_(keys.view(-1, num_kv_heads, head_dim, block_size).permute(0, 3, 1, 2))
        out[1].copy_(values.view(-1, num_kv_heads, block_size, head_dim).transpose(1, 2))
    else:
        out[0].copy_(keys[:, :, layout.key_offsets].transpose(1, 2))
        out[1].copy_(values[:, :, layout.value_offsets].transpose(1, 2))
    return out[0].flatten(0, 1), out[1].flatten(0, 1)


def move_slots(
    kv_caches: Sequence[torch.Tensor],  # of one shape, each [num_blocks, num_kv_heads, block_size, 2 * head_dim]
    layout: PackedLayout,
    sources: torch.Tensor,  # [num_tokens] int64
    targets: torch.Tensor,  # [num_tokens] int64
) -> None:
    """Copy single tokens; all are read before any is written."""
    if native.runs():
        torch.ops.vllm_eagle.move_slots(kv_caches, layout.key_offsets, layout.value_offsets, sources, targets)
        return
    num_blocks, num_kv_heads, block_size, width = kv_caches[0].shape
    heads = torch.arange(num_kv_heads)[None, :, None]
    places = [
        [(slots[:, None, None] // block_size, heads, kind, offsets[slots % block_size][:, None]) for slots in (sources, targets)]
        for kind, offsets in enumerate((layout.key_offsets, layout.value_offsets))
    ]
    for kv_cache in kv_caches:
        packed = kv_cache.view(num_blocks, num_kv_heads, 2, block_size * width // 2)
        for source, target in places:
            packed[target] = packed[source]
