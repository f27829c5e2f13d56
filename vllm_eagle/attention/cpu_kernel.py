"""Tree attention on CPU, for all trees of a batch in one call.

bfloat16 and float16 run through `extend_attention_cpu`, a kernel with a tree mask that vLLM's CPU wheel carries. It reads keys and
values token by token, so the context is copied out of vLLM's packed blocks first. Measured on one core (AVX-512, bfloat16, 17 rows
over 1,000 tokens, `python -m vllm_eagle.bench.attention`): the copy costs about half of the kernel, the two together are several
times faster than batched matrix products, and keeping the whole cache token-major instead would save the copy but make rows
without a tree 1.5 to 2.4 times slower than vLLM's own kernel. float32, which that kernel does not take, goes through torch's
scaled_dot_product_attention.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """Where the context of every tree lies: its blocks, read out one after the other into one buffer of tokens."""

    blocks: torch.Tensor  # [num_read] int64
    lens: torch.Tensor  # [num_trees] int64
    token_table: torch.Tensor  # [num_trees, max(lens)] int32, place of each context token in the buffer

    @classmethod
    def of(cls, block_table: torch.Tensor, context_lens: torch.Tensor, block_size: int) -> "Context":
        """From block tables [num_trees, max_blocks] int32 and lengths [num_trees] int64."""
        counts = (context_lens + block_size - 1) // block_size
        used = torch.arange(block_table.shape[1]) < counts[:, None]
        starts = (counts.cumsum(0) - counts) * block_size
        longest = max(1, int(context_lens.max()))
        table = (starts[:, None] + torch.arange(longest)).to(torch.int32)
        return cls(block_table[used].long(), context_lens, table)


@dataclass(frozen=True, slots=True, eq=False)
class TreeRows:
    """The rows of every tree: consecutive rows of the query, keys and values."""

    first_rows: torch.Tensor  # [num_trees] int32
    num_rows: torch.Tensor  # [num_trees] int32
    ancestors: torch.Tensor  # [num_trees, max_rows, max_rows] bool


def tree_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, head_dim]
    key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
    value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
    context_key: torch.Tensor,  # [num_buffered, num_kv_heads, head_dim]
    context_value: torch.Tensor,  # [num_buffered, num_kv_heads, head_dim]
    context: Context,
    rows: TreeRows,
    scale: float,
    output: torch.Tensor,  # [num_tokens, num_heads, head_dim], only the trees' rows are written
) -> None:
    """Attend from every tree row to its context and its ancestors. Equals reference.tree_attention per tree."""
    if query.dtype == torch.float32:
        _by_sdpa(query, key, value, context_key, context_value, context, rows, scale, output)
        return
    torch.ops._C.extend_attention_cpu(
        query,
        key,
        value,
        output,
        context_key,
        context_value,
        context.token_table,
        torch.arange(len(rows.num_rows)),
        context.lens + rows.num_rows,
        rows.num_rows,
        rows.first_rows,
        rows.ancestors.shape[1],
        scale,
        0.0,  # no logit soft cap
        False,  # no cross attention
        -1,  # no sliding window
        None,
        None,
        rows.ancestors.flatten(),
    )


def _by_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context_key: torch.Tensor,
    context_value: torch.Tensor,
    context: Context,
    rows: TreeRows,
    scale: float,
    output: torch.Tensor,
) -> None:
    group = query.shape[1] // key.shape[1]
    per_tree = zip(rows.first_rows.tolist(), rows.num_rows.tolist(), context.lens.tolist(), strict=True)
    for tree, (first, count, context_len) in enumerate(per_tree):
        own = slice(first, first + count)
        start = int(context.token_table[tree, 0])
        seen = slice(start, start + context_len)
        keys = torch.cat([context_key[seen], key[own]]).transpose(0, 1)
        values = torch.cat([context_value[seen], value[own]]).transpose(0, 1)
        # Rows of the query heads that share a key head are stacked, so keys need no copies.
        stacked = query[own].unflatten(1, (-1, group)).permute(1, 2, 0, 3).flatten(1, 2)
        visible = F.pad(rows.ancestors[tree, :count, :count], (context_len, 0), value=True).repeat(group, 1)
        attended = F.scaled_dot_product_attention(stacked[None], keys[None], values[None], visible, scale=scale)[0]
        output[own] = attended.unflatten(1, (group, count)).permute(2, 0, 1, 3).flatten(1, 2)
