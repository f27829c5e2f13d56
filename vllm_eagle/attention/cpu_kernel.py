"""Tree attention on CPU, for all trees of a batch in one call.

bfloat16 runs through `extend_attention_cpu`, a kernel with a tree mask that vLLM's CPU wheel carries. It reads keys and values
token by token, so the context is copied out of vLLM's packed blocks first. What that kernel cannot do, float32 always
and float16 without AMX, goes through torch's scaled_dot_product_attention.

Measured (`python -m vllm_eagle.bench.attention`, one core with AVX-512, bfloat16, 17 rows): the copy takes four to eight
tenths of the kernel's time; both together take a third to seven tenths of the time of the copy with torch's attention. A
token-major cache would save the copy and run prefill in two thirds of the time, but it would need a second cache format for every
dtype and CPU that the masked kernel lacks, and rows without a tree would no longer be computed, bit for bit, by vLLM's own kernel.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """Where the context of every tree lies: its blocks, read out one after the other into one buffer of tokens."""

    blocks: torch.Tensor  # [num_read] int64
    lens: torch.Tensor  # [num_trees] int64
    token_table: torch.Tensor  # [num_trees, max(lens) + most rows] int32, place of each context token in the buffer

    @classmethod
    def of(cls, block_table: torch.Tensor, context_lens: torch.Tensor, block_size: int, most_rows: int) -> "Context":
        """From block tables [num_trees, max_blocks] int32 and lengths [num_trees] int64; the kernel wants room for the rows."""
        counts = (context_lens + block_size - 1) // block_size
        used = torch.arange(block_table.shape[1]) < counts[:, None]
        starts = (counts.cumsum(0) - counts) * block_size
        table = (starts[:, None] + torch.arange(int(context_lens.max()) + most_rows)).to(torch.int32)
        return cls(block_table[used].long(), context_lens, table)


@dataclass(frozen=True, slots=True, eq=False)
class TreeRows:
    """The rows of every tree: consecutive rows of the query, keys and values."""

    first_rows: torch.Tensor  # [num_trees] int64
    num_rows: torch.Tensor  # [num_trees] int64
    ancestors: torch.Tensor  # [num_trees, max_rows, max_rows] bool; rows that pad a smaller tree see themselves

    @property
    def is_row(self) -> torch.Tensor:
        """[num_trees, max_rows] bool, false for padding."""
        return torch.arange(self.ancestors.shape[1]) < self.num_rows[:, None]

    @property
    def padded(self) -> torch.Tensor:
        """Rows of the query, [num_trees, max_rows] int64; padding repeats the last row."""
        offsets = torch.minimum(torch.arange(self.ancestors.shape[1]), self.num_rows[:, None] - 1)
        return self.first_rows[:, None] + offsets


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
    if not masked_kernel_runs(query.dtype):
        _by_sdpa(query, key, value, context_key, context_value, context, rows, scale, output)
        return
    _by_masked_kernel(query, key, value, context_key, context_value, context, rows, scale, output)


@cache
def masked_kernel_runs(dtype: torch.dtype) -> bool:
    """Whether vLLM's masked kernel exists and takes this dtype on this CPU: known by trying it once on one token."""
    query, key = torch.zeros(1, 1, 32, dtype=dtype), torch.zeros(2, 1, 32, dtype=dtype)
    context = Context(torch.zeros(0, dtype=torch.long), torch.ones(1, dtype=torch.long), torch.zeros(1, 2, dtype=torch.int32))
    rows = TreeRows(torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long), torch.ones(1, 1, 1, dtype=torch.bool))
    try:
        _by_masked_kernel(query, key[:1], key[:1], key, key, context, rows, 1.0, query.clone())
    except (RuntimeError, AttributeError):
        return False
    return True


def _by_masked_kernel(
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
    num_trees, max_rows, _ = rows.ancestors.shape
    padded = rows.padded.flatten()  # with a tree mask, the kernel takes as many rows from every sequence
    attended = query.new_empty(len(padded), *query.shape[1:])
    torch.ops._C.extend_attention_cpu(
        query[padded],
        key[padded],
        value[padded],
        attended,
        context_key,
        context_value,
        context.token_table,
        torch.arange(num_trees),
        context.lens + max_rows,
        torch.full((num_trees,), max_rows, dtype=torch.int32),
        torch.arange(num_trees, dtype=torch.int32) * max_rows,
        max_rows,
        scale,
        0.0,  # no logit soft cap
        False,  # no cross attention
        -1,  # no sliding window
        None,
        None,
        rows.ancestors.flatten(),
    )
    is_row = rows.is_row.flatten()
    output[padded[is_row]] = attended[is_row]


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
