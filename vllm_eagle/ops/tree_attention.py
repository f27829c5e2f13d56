"""Paged tree attention: every row of every tree over its request's context and over what it sees of its own tree, in one launch.

One program takes the rows of one tree and one key head (rows of all query heads that share it, stacked) over one part of the
context, so that keys and values are read once for all rows. The last part also holds the tree's own keys, under its mask. Where a
context is cut into several parts, a second launch merges them by their log-sum-exp (as FlashDecoding does).

How many parts there may be is all that is decided before; where a context is cut is found on the GPU, by its length. So a launch in
a CUDA graph is right for any lengths later, and for requests without rows.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from vllm_eagle.ops.rows import TreeRows, within_window

_LOG2_E = 1.4426950408889634
_MOST_SPLITS = 64
_MERGED_AT_ONCE = 8
_WAVES = 2  # programs per multiprocessor to aim for
_TWO_SCALED_STAGES_BYTES = 112 << 10  # of shared memory, in the largest tiles


@triton.jit
def _fold(scores, value, top, total, found):
    """One step of online softmax: scores [rows, keys] in powers of two, value [keys, dim]."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that have seen nothing yet
    weights = tl.exp2(scores - base[:, None])
    faded = tl.exp2(top - base)
    total = total * faded + tl.sum(weights, 1)
    found = found * faded[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return new_top, total, found


@triton.jit
def _attend(query, key, value, seen, top, total, found, scale, soft_cap, CAP: tl.constexpr, LOG2_E: tl.constexpr):
    """Fold in more keys: key and value [keys, dim], seen [rows, keys]."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if CAP:
        scores = soft_cap * (2 * tl.sigmoid(2 * scores / soft_cap) - 1)
    return _fold(tl.where(seen, scores * LOG2_E, float("-inf")), value, top, total, found)


@triton.jit
def _cuts(context_len, splits, BLOCK_N: tl.constexpr):
    """Tokens of a part, whole tiles, and the last part of this context, which may be an earlier one than the last of all."""
    size = tl.maximum(tl.cdiv(tl.cdiv(context_len, splits), BLOCK_N), 1) * BLOCK_N
    return size, tl.maximum(tl.cdiv(context_len, size), 1) - 1


# Not specialized on what changes from step to step: that would compile while requests wait.
@triton.jit(do_not_specialize=["window", "splits", "all_rows", "visible_tree", "visible_row", "table_row"])
def _part(
    query, key, value, kv_cache, block_table, context_lens, first_rows, num_rows, first_keys, num_keys, visible, sinks,
    output, log_sums, first_places,
    scale, key_scale, value_scale, soft_cap, window, splits, all_rows, all_heads,
    query_row, query_head, key_row, key_head, value_row, value_head,
    cache_block, cache_head, cache_slot, table_row, visible_tree, visible_row, output_row, output_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    tree, kv_head = tl.program_id(0), tl.program_id(1)
    split, row_block = tl.program_id(2) % splits, tl.program_id(2) // splits
    rows, context_len = tl.load(num_rows + tree), tl.load(context_lens + tree)
    size, last = _cuts(context_len, splits, BLOCK_N)
    if (row_block * BLOCK_M >= rows * GROUP) | (split > last):
        return
    stacked = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row, head = stacked // GROUP, kv_head * GROUP + stacked % GROUP
    is_row = row < rows
    dim = tl.arange(0, BLOCK_D)
    is_dim = dim < HEAD_DIM
    own_row = tl.load(first_rows + tree) + row
    places = own_row[:, None] * query_row + head[:, None] * query_head + dim[None, :]
    asked = tl.load(query + places, mask=is_row[:, None] & is_dim[None, :], other=0.0)

    keys, first_key = tl.load(num_keys + tree), tl.load(first_keys + tree)
    sees = visible + tree * visible_tree + row[:, None] * visible_row  # [BLOCK_M, 1]
    tile = tl.arange(0, BLOCK_N)
    lowest = 0  # position of the first key that may be seen
    depth = tl.zeros([BLOCK_M], tl.int32)  # keys of its own tree that a row sees: its position, from the context's end, plus one
    if WINDOW:
        for start in range(0, keys, BLOCK_N):
            own = start + tile
            mask = tl.load(sees + own[None, :], mask=is_row[:, None] & (own < keys)[None, :], other=0)
            depth += tl.sum((mask != 0).to(tl.int32), 1)
        lowest = tl.maximum(context_len - window + 1, 0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    found = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin = tl.maximum(split * size, lowest)
    end = tl.minimum((split + 1) * size, context_len)
    for start in range(begin, end, BLOCK_N):
        position = start + tile
        is_token = position < end
        block = tl.load(block_table + tree * table_row + position // PAGE, mask=is_token, other=0).to(tl.int64)
        at = block * cache_block + kv_head.to(tl.int64) * cache_head + (position % PAGE) * cache_slot
        here = is_token[:, None] & is_dim[None, :]
        k = tl.load(kv_cache + at[:, None] + dim[None, :], mask=here, other=0.0)
        v = tl.load(kv_cache + at[:, None] + HEAD_DIM + dim[None, :], mask=here, other=0.0)
        if SCALED:  # an 8-bit cache
            k, v = k.to(tl.float32) * key_scale, v.to(tl.float32) * value_scale
        seen = is_row[:, None] & is_token[None, :]
        if WINDOW:
            seen = seen & (position[None, :] > (context_len + depth - 1 - window)[:, None])
        top, total, found = _attend(
            asked, k.to(asked.dtype), v.to(asked.dtype), seen, top, total, found, scale, soft_cap, CAP, LOG2_E
        )

    if split == last:
        before = tl.zeros([BLOCK_M], tl.int32)
        for start in range(0, keys, BLOCK_N):
            own = start + tile
            is_key = own < keys
            here = is_key[:, None] & is_dim[None, :]
            k = tl.load(key + (first_key + own)[:, None] * key_row + kv_head * key_head + dim[None, :], mask=here, other=0.0)
            v = tl.load(value + (first_key + own)[:, None] * value_row + kv_head * value_head + dim[None, :], mask=here, other=0.0)
            mask = tl.load(sees + own[None, :], mask=is_row[:, None] & is_key[None, :], other=0)
            seen = mask != 0
            if WINDOW:  # the n-th key that a row sees stands n places below the context's end
                count = seen.to(tl.int32)
                nth = before[:, None] + tl.cumsum(count, 1)
                before += tl.sum(count, 1)
                seen = seen & (nth > (depth - window)[:, None])
            top, total, found = _attend(asked, k, v, seen, top, total, found, scale, soft_cap, CAP, LOG2_E)
        if SINKS:  # a key without a value; each row sees itself, so its highest score is finite
            sink = tl.load(sinks + head, mask=is_row, other=float("-inf")).to(tl.float32) * LOG2_E
            new_top = tl.maximum(top, sink)
            base = tl.where(new_top == float("-inf"), 0.0, new_top)  # places of no row
            faded = tl.exp2(top - base)
            total = total * faded + tl.exp2(sink - base)
            found = found * faded[:, None]
            top = new_top

    found = found / tl.where(total > 0, total, 1.0)[:, None]
    here = is_row[:, None] & is_dim[None, :]
    if SPLIT:
        place = (split.to(tl.int64) * all_rows + tl.load(first_places + tree) + row) * all_heads + head
        tl.store(output + place[:, None] * HEAD_DIM + dim[None, :], found, mask=here)
        tl.store(log_sums + place, tl.where(total > 0, top + tl.log2(total), float("-inf")), mask=is_row)
    else:
        places = own_row[:, None] * output_row + head[:, None] * output_head + dim[None, :]
        tl.store(output + places, found.to(output.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["splits", "all_rows"])
def _merge(
    parts, log_sums, output, context_lens, first_places, first_rows, num_rows, splits, all_rows, all_heads, output_row, output_head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MOST: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    tree, row, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if row >= tl.load(num_rows + tree):
        return
    _, last = _cuts(tl.load(context_lens + tree), splits, BLOCK_N)
    own_row = tl.load(first_rows + tree) + row
    place = ((tl.load(first_places + tree) + row) * all_heads + head).to(tl.int64)
    next_split = all_rows.to(tl.int64) * all_heads
    every = tl.arange(0, MOST)
    log_sum = tl.load(log_sums + place + every * next_split, mask=every <= last, other=float("-inf"))
    top = tl.max(log_sum, 0)
    total = tl.sum(tl.exp2(log_sum - top), 0)
    dim = tl.arange(0, BLOCK_D)
    is_dim = dim < HEAD_DIM
    merged = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, last + 1, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        is_split = split <= last
        at = place + split * next_split
        weight = tl.exp2(tl.load(log_sums + at, mask=is_split, other=float("-inf")) - top) / total
        part = tl.load(parts + at[:, None] * HEAD_DIM + dim[None, :], mask=is_split[:, None] & is_dim[None, :], other=0.0)
        merged += tl.sum(weight[:, None] * part, 0)
    tl.store(output + own_row * output_row + head * output_head + dim, merged.to(output.dtype.element_ty), mask=is_dim)


def tree_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, head_dim]
    key: torch.Tensor,  # [num_tree_keys, num_kv_heads, head_dim]
    value: torch.Tensor,  # [num_tree_keys, num_kv_heads, head_dim]
    kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_dim], any strides but the last, which is 1
    rows: TreeRows,
    scale: float,
    output: torch.Tensor,  # [num_tokens, num_heads, head_dim], only the trees' rows are written
    longest_context: int,  # at least the longest of `rows.context_lens`, for which parts are reckoned; known on the host
    soft_cap: float = 0.0,  # scores go through cap * tanh(score / cap); 0: they do not
    window: int = 0,  # a row at position p sees positions above p - window; 0: all
    key_scale: float = 1.0,  # of an 8-bit cache
    value_scale: float = 1.0,
    sinks: torch.Tensor | None = None,  # [num_heads], scores of a key without a value that every row sees
    num_splits: int | None = None,  # parts of the context, at most 64; None: as many as fill the GPU
) -> None:
    """Equals `reference`, for any mixture of trees. Key and value are those of tree rows, in the query's dtype."""
    num_kv_heads = key.shape[1]
    num_trees, max_rows, _ = rows.visible.shape
    if num_trees == 0 or max_rows == 0:
        return
    group = query.shape[1] // num_kv_heads
    block_m, block_n = _blocks(query, max_rows * group)
    if num_splits is None:
        programs = num_trees * num_kv_heads * triton.cdiv(max_rows * group, block_m)
        num_splits = _filling_splits(query.device, programs, longest_context, block_n)
    options = (scale, soft_cap, window, key_scale, value_scale)
    if num_splits == 1:
        _launch(query, key, value, kv_cache, rows, rows.context_lens, options, sinks, output, None, None, 1)
        return
    assert num_splits <= _MOST_SPLITS
    # Room for the trees' rows alone: a prompt beside them may have thousands.
    parts, log_sums = _workspace(query, num_splits, num_trees * max_rows)
    places = torch.arange(num_trees, device=query.device, dtype=torch.int32) * max_rows
    _launch(query, key, value, kv_cache, rows, rows.context_lens, options, sinks, parts, log_sums, places, num_splits)
    _merge[(num_trees, max_rows, query.shape[1])](
        parts, log_sums, output, rows.context_lens, places, rows.first_rows, rows.num_rows, num_splits, *parts.shape[1:3],
        *output.stride()[:2], HEAD_DIM=query.shape[2], BLOCK_D=triton.next_power_of_2(query.shape[2]), BLOCK_N=block_n,
        MOST=_MOST_SPLITS, BLOCK_S=_MERGED_AT_ONCE, num_warps=2,
    )  # fmt: skip


def own_attention(
    query: torch.Tensor,  # as in tree_attention
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,  # not read
    rows: TreeRows,
    scale: float,
    places: torch.Tensor,  # [num_trees] int32, where each tree's first row goes in the answer
    num_places: int,
    soft_cap: float = 0.0,
    window: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # [num_places, num_heads, head_dim] and log-sum-exp [num_heads, num_places], float32
    """Every tree row over what it sees of its own tree alone, for a merge with somebody else's attention over the context.

    Equals `reference` where all contexts are empty. The answer holds trees' rows alone: a prompt beside them may have thousands.
    """
    found, log_sums = _workspace(query, 1, num_places)
    if rows.visible.numel():
        empty, options = torch.zeros_like(rows.context_lens), (scale, soft_cap, window, 1.0, 1.0)
        _launch(query, key, value, kv_cache, rows, empty, options, None, found, log_sums, places, 1)
    return found[0], (log_sums[0] / _LOG2_E).t().contiguous()


def _filling_splits(device: torch.device, programs: int, longest_context: int, block_n: int) -> int:
    """Parts of contexts that fill the GPU, where each makes so many programs; none shorter than four tiles."""
    fill = triton.cdiv(_WAVES * _multiprocessors(device), programs)
    return max(1, min(fill, _MOST_SPLITS, longest_context // (4 * block_n)))


def _workspace(query: torch.Tensor, num_splits: int, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    parts = query.new_empty(num_splits, num_rows, *query.shape[1:], dtype=torch.float32)
    return parts, parts.new_empty(parts.shape[:-1])


def _blocks(query: torch.Tensor, stacked: int) -> tuple[int, int]:
    """Rows and keys of a program at a time: as many rows as registers hold, so that keys are read once."""
    wide, exact = query.shape[2] > 128, query.dtype == torch.float32
    most = 32 if wide and exact else 64 if wide or exact else 128
    return min(max(triton.next_power_of_2(stacked), 16), most), 32 if wide or exact else 64


def _stages(query: torch.Tensor, kv_cache: torch.Tensor) -> int:
    """Tiles of keys and values in flight. Where an 8-bit cache's do not fit beside their copies in 16 bits, one."""
    if query.dtype == torch.float32:
        return 1
    return 2 if kv_cache.dtype.itemsize > 1 or _shared_memory(query.device) >= _TWO_SCALED_STAGES_BYTES else 1


def _launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    rows: TreeRows,
    context_lens: torch.Tensor,
    options: tuple[float, float, int, float, float],  # scale, soft cap, window, scales of keys and values in the cache
    sinks: torch.Tensor | None,
    output: torch.Tensor,  # the whole answer, or with `log_sums` the parts' [num_splits, num_places, num_heads, head_dim]
    log_sums: torch.Tensor | None,
    places: torch.Tensor | None,  # [num_trees] int32, first place of each tree in the parts
    num_splits: int,
) -> None:
    scale, soft_cap, window, key_scale, value_scale = options
    num_heads, head_dim = query.shape[1:]
    num_trees, max_rows, _ = rows.visible.shape
    group = num_heads // key.shape[1]
    block_m, block_n = _blocks(query, max_rows * group)
    visible = rows.visible.view(torch.uint8)
    _part[(num_trees, key.shape[1], num_splits * triton.cdiv(max_rows * group, block_m))](
        query, key, value, kv_cache, rows.block_table, context_lens, rows.first_rows, rows.num_rows, rows.first_keys,
        rows.num_keys, visible, query if sinks is None else sinks, output, output if log_sums is None else log_sums,
        rows.first_rows if places is None else places,
        scale, key_scale, value_scale, soft_cap, window, num_splits, output.shape[-3], num_heads,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *kv_cache.stride()[:3],
        rows.block_table.stride(0), *visible.stride()[:2], *output.stride()[-3:-1],
        GROUP=group, HEAD_DIM=head_dim, PAGE=kv_cache.shape[2], BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_D=triton.next_power_of_2(head_dim), CAP=soft_cap > 0, WINDOW=window > 0, SINKS=sinks is not None,
        SPLIT=log_sums is not None, SCALED=kv_cache.dtype.itemsize == 1, LOG2_E=_LOG2_E,
        num_warps=8 if block_m > 64 else 4, num_stages=_stages(query, kv_cache),
    )  # fmt: skip


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _shared_memory(device: torch.device) -> int:
    """Most bytes that a program may have: 99 KiB on GPUs of capability 8.6, 8.9 and 12.0, at least 163 KiB on 8.0, 9.0 and 10.0."""
    if device.type != "cuda":
        return 0
    with torch.cuda.device(device):
        return driver.active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    rows: TreeRows,
    scale: float,
    output: torch.Tensor,
    soft_cap: float = 0.0,
    window: int = 0,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    sinks: torch.Tensor | None = None,
    log_sums: torch.Tensor | None = None,  # [num_heads, num_tokens] float32, log-sum-exp of the trees' rows is written
    dtype: torch.dtype = torch.float32,  # in which all is computed
) -> None:
    """The same in plain torch, tree after tree."""
    block_size, head_dim, group = kv_cache.shape[2], query.shape[2], query.shape[1] // key.shape[1]
    counts = (rows.context_lens, rows.first_rows, rows.num_rows, rows.first_keys, rows.num_keys)
    for tree, (context_len, first_row, num_rows, first_key, num_keys) in enumerate(zip(*(x.tolist() for x in counts), strict=True)):
        position = torch.arange(context_len, device=query.device)
        block = rows.block_table[tree, position // block_size].long()
        context = kv_cache[block, :, position % block_size].to(dtype)  # [context_len, num_kv_heads, 2 * head_dim]
        own = slice(first_key, first_key + num_keys)
        keys, values = (
            torch.cat([seen, x[own].to(dtype)]).repeat_interleave(group, 1)
            for seen, x in ((context[..., :head_dim] * key_scale, key), (context[..., head_dim:] * value_scale, value))
        )
        seen = within_window(rows.visible[tree, :num_rows, :num_keys], context_len, window)
        scores = torch.einsum("qhd,khd->hqk", query[first_row : first_row + num_rows].to(dtype), keys) * scale
        if soft_cap > 0:
            scores = soft_cap * (scores / soft_cap).tanh()
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:  # one more key, whose value is zero
            scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, num_rows, 1)], -1)
            values = torch.nn.functional.pad(values, (0, 0, 0, 0, 0, 1))
        output[first_row : first_row + num_rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(output.dtype)
        if log_sums is not None:
            log_sums[:, first_row : first_row + num_rows] = scores.logsumexp(-1)
