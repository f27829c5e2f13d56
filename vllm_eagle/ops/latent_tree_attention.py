"""Paged tree attention over latents (MLA, DeepSeek-V2, arXiv 2405.04434, in its absorbed form): one key for all heads, whose first
part is the value as well.

As tree_attention.py, of which it takes the cuts of contexts and the merge of parts: one program takes rows of one tree, all heads
stacked, over one part of the context, the last part also the tree's own latents under its mask. A latent is read once for the
scores and for the sum. Its two parts, 512 and 64 numbers in DeepSeek's models, are multiplied apart, since a tile is as wide as a
power of two.
"""

import torch
import triton
import triton.language as tl

from vllm_eagle.ops.rows import TreeRows
from vllm_eagle.ops.tree_attention import _LOG2_E, _MERGED_AT_ONCE, _MOST_SPLITS, _cuts, _filling_splits, _fold, _merge


@triton.jit
def _attend(query, query_rope, latent, rope, seen, top, total, found, scale):
    """Fold in more keys: latent [keys, rank], rope [keys, rope_dim], seen [rows, keys]."""
    scores = tl.dot(query, tl.trans(latent), input_precision="ieee")
    scores = (scores + tl.dot(query_rope, tl.trans(rope), input_precision="ieee")) * scale  # in powers of two
    return _fold(tl.where(seen, scores, float("-inf")), latent, top, total, found)


# Not specialized on what changes from step to step: that would compile while requests wait.
@triton.jit(do_not_specialize=["splits", "all_rows", "visible_tree", "visible_row", "table_row"])
def _part(
    query, latent, cache, block_table, context_lens, first_rows, num_rows, first_keys, num_keys, visible,
    output, log_sums, first_places,
    scale, splits, all_rows, query_row, query_head, latent_row,
    cache_block, cache_slot, table_row, visible_tree, visible_row, output_row, output_head,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    tree, split, row_block = tl.program_id(0), tl.program_id(1) % splits, tl.program_id(1) // splits
    rows, context_len = tl.load(num_rows + tree), tl.load(context_lens + tree)
    size, last = _cuts(context_len, splits, BLOCK_N)
    if (row_block * BLOCK_M >= rows * HEADS) | (split > last):
        return
    stacked = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row, head = stacked // HEADS, stacked % HEADS
    is_row = row < rows
    dim, turned = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    is_dim, is_turned = dim < RANK, turned < ROPE
    own_row = tl.load(first_rows + tree) + row
    places = (own_row * query_row + head * query_head)[:, None]
    asked = tl.load(query + places + dim[None, :], mask=is_row[:, None] & is_dim[None, :], other=0.0)
    asked_rope = tl.load(query + places + RANK + turned[None, :], mask=is_row[:, None] & is_turned[None, :], other=0.0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    found = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tile = tl.arange(0, BLOCK_N)
    end = tl.minimum((split + 1) * size, context_len)
    for start in range(split * size, end, BLOCK_N):
        position = start + tile
        is_token = position < end
        block = tl.load(block_table + tree * table_row + position // PAGE, mask=is_token, other=0).to(tl.int64)
        at = cache + (block * cache_block + (position % PAGE) * cache_slot)[:, None]
        key = tl.load(at + dim[None, :], mask=is_token[:, None] & is_dim[None, :], other=0.0)
        rope = tl.load(at + RANK + turned[None, :], mask=is_token[:, None] & is_turned[None, :], other=0.0)
        seen = is_row[:, None] & is_token[None, :]
        top, total, found = _attend(asked, asked_rope, key.to(asked.dtype), rope.to(asked.dtype), seen, top, total, found, scale)

    if split == last:
        keys, first_key = tl.load(num_keys + tree), tl.load(first_keys + tree)
        sees = visible + tree * visible_tree + row[:, None] * visible_row  # [BLOCK_M, 1]
        for start in range(0, keys, BLOCK_N):
            own = start + tile
            is_key = own < keys
            at = latent + ((first_key + own) * latent_row)[:, None]
            key = tl.load(at + dim[None, :], mask=is_key[:, None] & is_dim[None, :], other=0.0)
            rope = tl.load(at + RANK + turned[None, :], mask=is_key[:, None] & is_turned[None, :], other=0.0)
            seen = tl.load(sees + own[None, :], mask=is_row[:, None] & is_key[None, :], other=0) != 0
            top, total, found = _attend(asked, asked_rope, key, rope, seen, top, total, found, scale)

    found = found / tl.where(total > 0, total, 1.0)[:, None]
    here = is_row[:, None] & is_dim[None, :]
    if SPLIT:
        place = (split.to(tl.int64) * all_rows + tl.load(first_places + tree) + row) * HEADS + head
        tl.store(output + place[:, None] * RANK + dim[None, :], found, mask=here)
        tl.store(log_sums + place, tl.where(total > 0, top + tl.log2(total), float("-inf")), mask=is_row)
    else:
        places = (own_row * output_row + head * output_head)[:, None]
        tl.store(output + places + dim[None, :], found.to(output.dtype.element_ty), mask=here)


def latent_tree_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, rank + rope_dim], absorbed: multiplied into the latents' space
    latent: torch.Tensor,  # [num_tree_keys, rank + rope_dim], normed and turned, as they go to the cache
    cache: torch.Tensor,  # [num_blocks, block_size, rank + rope_dim], any strides but the last, which is 1
    rows: TreeRows,
    scale: float,
    output: torch.Tensor,  # [num_tokens, num_heads, rank], only the trees' rows are written
    longest_context: int,  # at least the longest of `rows.context_lens`, for which parts are reckoned; known on the host
    num_splits: int | None = None,  # parts of the context, at most 64; None: as many as fill the GPU
) -> None:
    """Equals `reference`, for any mixture of trees. Latents are those of tree rows, in the query's dtype."""
    num_trees, max_rows, _ = rows.visible.shape
    if num_trees == 0 or max_rows == 0:
        return
    num_heads, rank = output.shape[1:]
    rope_dim = query.shape[2] - rank
    block_m, block_n = _blocks(query)
    row_blocks = triton.cdiv(max_rows * num_heads, block_m)
    if num_splits is None:
        num_splits = _filling_splits(query.device, num_trees * row_blocks, longest_context, block_n)
    assert num_splits <= _MOST_SPLITS
    is_split, places = num_splits > 1, rows.first_rows
    found, log_sums = output, output
    if is_split:  # room for the trees' rows alone: a prompt beside them may have thousands
        found = query.new_empty(num_splits, num_trees * max_rows, num_heads, rank, dtype=torch.float32)
        log_sums = found.new_empty(found.shape[:-1])
        places = torch.arange(num_trees, device=query.device, dtype=torch.int32) * max_rows
    visible = rows.visible.view(torch.uint8)
    _part[(num_trees, num_splits * row_blocks)](
        query, latent, cache, rows.block_table, rows.context_lens, rows.first_rows, rows.num_rows, rows.first_keys,
        rows.num_keys, visible, found, log_sums, places,
        scale * _LOG2_E, num_splits, found.shape[-3], *query.stride()[:2], latent.stride(0),
        *cache.stride()[:2], rows.block_table.stride(0), *visible.stride()[:2], *found.stride()[-3:-1],
        HEADS=num_heads, RANK=rank, ROPE=rope_dim, PAGE=cache.shape[1], BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_D=triton.next_power_of_2(rank), BLOCK_R=triton.next_power_of_2(rope_dim), SPLIT=is_split,
        num_warps=8 if block_m > 16 else 4, num_stages=1,
    )  # fmt: skip
    if is_split:
        _merge[(num_trees, max_rows, num_heads)](
            found, log_sums, output, rows.context_lens, places, rows.first_rows, rows.num_rows, num_splits, *found.shape[1:3],
            *output.stride()[:2], HEAD_DIM=rank, BLOCK_D=triton.next_power_of_2(rank), BLOCK_N=block_n,
            MOST=_MOST_SPLITS, BLOCK_S=_MERGED_AT_ONCE, num_warps=2,
        )  # fmt: skip


def _blocks(query: torch.Tensor) -> tuple[int, int]:
    """Rows and keys of a program at a time: a row's sum alone is 512 numbers wide, so both are few."""
    return 16 if query.dtype == torch.float32 else 32, 16


def reference(
    query: torch.Tensor,
    latent: torch.Tensor,
    cache: torch.Tensor,
    rows: TreeRows,
    scale: float,
    output: torch.Tensor,
) -> None:
    """The same in plain torch and float32, tree after tree."""
    block_size, rank = cache.shape[1], output.shape[2]
    counts = (rows.context_lens, rows.first_rows, rows.num_rows, rows.first_keys, rows.num_keys)
    for tree, (context_len, first_row, num_rows, first_key, num_keys) in enumerate(zip(*(x.tolist() for x in counts), strict=True)):
        position = torch.arange(context_len, device=query.device)
        block = rows.block_table[tree, position // block_size].long()
        keys = torch.cat([cache[block, position % block_size], latent[first_key : first_key + num_keys]]).float()
        seen = torch.nn.functional.pad(rows.visible[tree, :num_rows, :num_keys], (context_len, 0), value=True)
        own = slice(first_row, first_row + num_rows)
        scores = torch.einsum("qhd,kd->hqk", query[own].float(), keys) * scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        output[own] = torch.einsum("hqk,kd->qhd", weights, keys[:, :rank]).to(output.dtype)
