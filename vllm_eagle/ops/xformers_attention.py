"""Tree attention by xformers (0.0.35): its partial attention over the paged context and over the trees' own keys, merged by their
log-sums. Not run on a GPU yet.

`xformers.ops.tree_attention` joins the same three parts with one bias for the whole batch, as static trees have; here each tree has
its own, so the parts are called one by one. All trees are padded to the largest: xformers takes as many rows from each.
"""

import torch
from xformers.ops import fmha
from xformers.ops.fmha.attn_bias import BlockDiagonalPaddedKeysMask, PagedBlockDiagonalPaddedKeysMask

from vllm_eagle.ops.rows import TreeRows

BLOCK_SIZE = 64  # its split kernel reads so many keys at once, and no block of the cache may end inside of them
HEAD_DIMS = (16, 32, 64, 128, 256, 512)
DTYPES = (torch.float16, torch.bfloat16)
_ALIGNED = 8  # elements that a row of a bias in memory is a multiple of


def tree_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, head_dim]
    key: torch.Tensor,  # [num_tree_keys, num_kv_heads, head_dim]
    value: torch.Tensor,  # [num_tree_keys, num_kv_heads, head_dim]
    kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_dim], in memory block by block, token by token
    rows: TreeRows,  # no context is empty
    scale: float,
    output: torch.Tensor,  # [num_tokens, num_heads, head_dim], only the trees' rows are written
    longest_context: int,  # at least that of any tree
) -> None:
    """As ops/tree_attention.py's of that name. Nothing is read back from the GPU."""
    _, max_rows, max_keys = rows.visible.shape
    groups, block_size = key.shape[1], kv_cache.shape[2]
    row_at, own_row = _places(rows.first_rows, rows.num_rows, max_rows)
    key_at, _ = _places(rows.first_keys, rows.num_keys, max_keys)
    queries = query[row_at].unflatten(2, (groups, -1))  # [num_trees, max_rows, groups, heads per group, head_dim]
    shape = queries.shape

    context_bias = _context_bias(rows, longest_context, max_rows, block_size)
    context = [_expanded(x.flatten(0, 1)[None], shape) for x in kv_cache.transpose(1, 2).split(shape[-1], dim=-1)]
    prefix, prefix_sums = fmha.memory_efficient_attention_partial(
        queries.flatten(0, 1)[None],
        *context,
        attn_bias=context_bias,
        scale=scale,
        op=fmha.triton_splitk.FwOp,  # the others take no blocks of 64, or are not in every build
    )
    prefix = prefix.view(shape)
    prefix_sums = prefix_sums.view(*shape[2:4], *shape[:2]).permute(2, 0, 1, 3)  # [num_trees, groups, heads per group, max_rows]

    suffix, suffix_sums = fmha.memory_efficient_attention_forward_requires_grad(
        queries,
        *(_expanded(x[key_at], shape) for x in (key, value)),
        attn_bias=_own_bias(rows, own_row, query.dtype)[:, None, None].expand(-1, *shape[2:4], -1, -1),
        scale=scale,
        op=fmha.triton_splitk.FwOp,
    )
    merged, _ = fmha.merge_attentions([prefix, suffix], [prefix_sums, suffix_sums], output_dtype=output.dtype)
    output[row_at] = merged.flatten(2, 3)  # padding repeats a tree's last row, so what is written twice is equal


def _places(first: torch.Tensor, number: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Consecutive places of each tree, padded by repeating the last: in the batch and in the tree, [num_trees, most]."""
    own = torch.arange(most, device=first.device).minimum(number[:, None] - 1)
    return first[:, None] + own, own


def _expanded(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """From [..., groups, head_dim] to [..., groups, heads per group, head_dim], in place."""
    return x.unsqueeze(-2).expand(*x.shape[:-1], shape[3], shape[4])


def _context_bias(rows: TreeRows, longest: int, max_rows: int, block_size: int) -> PagedBlockDiagonalPaddedKeysMask:
    """All rows of a tree see its whole context; lengths stay on the GPU, which is what a captured graph would do, too."""
    num_trees, max_blocks = rows.block_table.shape
    bias = BlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=[max_rows] * num_trees,
        kv_seqlen=[longest] * num_trees,
        kv_padding=max_blocks * block_size,
        device=rows.block_table.device,
    ).make_paged(rows.block_table, block_size, PagedBlockDiagonalPaddedKeysMask)
    bias.k_seqinfo.seqlen.copy_(rows.context_lens)
    return bias


def _own_bias(rows: TreeRows, own_row: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Zero where a row sees a key of its tree, else minus infinity: [num_trees, max_rows, max_keys]."""
    num_trees, max_rows, max_keys = rows.visible.shape
    visible = rows.visible.gather(1, own_row[:, :, None].expand(-1, -1, max_keys))
    visible &= torch.arange(max_keys, device=visible.device) < rows.num_keys[:, None, None]
    bias = torch.zeros(num_trees, max_rows, -(-max_keys // _ALIGNED) * _ALIGNED, dtype=dtype, device=visible.device)
    return bias[:, :, :max_keys].masked_fill_(~visible, float("-inf"))
