"""Tree attention on CPU, for all trees of a batch in one call, straight out of vLLM's packed KV cache.

The C++ operator (native/tree_attention.cpp) reads a tile of keys once for all rows that share it. Where it cannot be built, the
context is copied out token by token and goes through torch's scaled_dot_product_attention, tree after tree.

vLLM's wheel has a kernel with a tree mask, too (`extend_attention_cpu`). It reads token by token, so the cache has to be copied
out first, and it knows no float32; `python -m vllm_eagle.bench.speed.attention` compares (one core).
"""

import torch
import torch.nn.functional as F

from vllm_eagle import native
from vllm_eagle.attention.cpu_cache import PackedLayout, read_blocks
from vllm_eagle.ops.rows import TreeRows, within_window


def tree_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, head_dim]
    key: torch.Tensor,  # [num_tree_keys, num_kv_heads, head_dim]
    value: torch.Tensor,  # [num_tree_keys, num_kv_heads, head_dim]
    kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_dim], vLLM's logical view
    layout: PackedLayout,
    rows: TreeRows,
    scale: float,
    output: torch.Tensor,  # [num_tokens, num_heads, head_dim], only the trees' rows are written
    soft_cap: float = 0.0,  # scores go through cap * tanh(score / cap); 0: they do not
    window: int = 0,  # a row at position p sees positions above p - window; 0: all
    sinks: torch.Tensor | None = None,  # [num_heads] float32, scores of a key without a value that every row sees
) -> None:
    """Attend from every tree row to its context and what it sees of its tree. Equals ops/tree_attention.py's reference."""
    if native.runs():
        torch.ops.vllm_eagle.tree_attention(
            query,
            key,
            value,
            kv_cache,
            layout.key_offsets,
            layout.value_offsets,
            layout.packing,
            rows.block_table,
            rows.context_lens,
            rows.first_rows,
            rows.num_rows,
            rows.first_keys,
            rows.num_keys,
            rows.visible,
            scale,
            soft_cap,
            window,
            sinks,
            output,
        )
    else:
        _by_torch(query, key, value, kv_cache, layout, rows, scale, output, soft_cap, window, sinks)


def _by_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    layout: PackedLayout,
    rows: TreeRows,
    scale: float,
    output: torch.Tensor,
    soft_cap: float,
    window: int,
    sinks: torch.Tensor | None,
) -> None:
    group, block_size = query.shape[1] // key.shape[1], kv_cache.shape[2]
    counts = (rows.context_lens, rows.first_rows, rows.num_rows, rows.first_keys, rows.num_keys)
    for tree, (context_len, first_row, num_rows, first_key, num_keys) in enumerate(zip(*(x.tolist() for x in counts), strict=True)):
        blocks = rows.block_table[tree, : -(-context_len // block_size)].long()
        own, keys_own = slice(first_row, first_row + num_rows), slice(first_key, first_key + num_keys)
        context = (x[:context_len] for x in read_blocks(kv_cache, layout, blocks))
        keys, values = (torch.cat([seen, x[keys_own]]).transpose(0, 1) for seen, x in zip(context, (key, value), strict=True))
        # Rows of the query heads that share a key head are stacked, so keys need no copies.
        stacked = query[own].unflatten(1, (-1, group)).permute(1, 2, 0, 3).flatten(1, 2)
        visible = within_window(rows.visible[tree, :num_rows, :num_keys], context_len, window).repeat(group, 1)
        if soft_cap or sinks is not None:
            attended = _attended(stacked, keys, values, visible, scale, soft_cap, sinks)
        else:
            attended = F.scaled_dot_product_attention(stacked[None], keys[None], values[None], visible, scale=scale)[0]
        output[own] = attended.unflatten(1, (group, num_rows)).permute(2, 0, 1, 3).flatten(1, 2)


def _attended(
    stacked: torch.Tensor,  # [num_kv_heads, group * num_rows, head_dim]
    keys: torch.Tensor,  # [num_kv_heads, num_keys, head_dim]
    values: torch.Tensor,  # [num_kv_heads, num_keys, head_dim]
    visible: torch.Tensor,  # [group * num_rows, num_keys] bool
    scale: float,
    soft_cap: float,
    sinks: torch.Tensor | None,  # [num_heads]
) -> torch.Tensor:  # as `stacked`
    scores = stacked.float() @ keys.float().transpose(1, 2) * scale
    if soft_cap:
        scores = soft_cap * (scores / soft_cap).tanh()
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:  # one more key, which has no value
        each = sinks.float().view(len(keys), -1, 1).repeat_interleave(scores.shape[1] * len(keys) // len(sinks), 1)
        scores = torch.cat([scores, each], 2)
    return (scores.softmax(-1)[..., : keys.shape[1]] @ values.float()).to(stacked.dtype)
