"""Tree attention in plain torch: slow, obvious, the oracle of all tests."""

import torch


def tree_attention(
    query: torch.Tensor,  # [num_rows, num_heads, head_dim], the rows of one tree
    tree_key: torch.Tensor,  # [num_rows, num_kv_heads, head_dim]
    tree_value: torch.Tensor,  # [num_rows, num_kv_heads, head_dim]
    context_key: torch.Tensor,  # [context_len, num_kv_heads, head_dim]
    context_value: torch.Tensor,  # [context_len, num_kv_heads, head_dim]
    ancestors: torch.Tensor,  # [num_rows, num_rows] bool
    depths: torch.Tensor,  # [num_rows] integer
    scale: float,
    window: int = 0,  # a row at position p sees positions above p - window; 0: all
    soft_cap: float = 0.0,  # scores go through cap * tanh(score / cap); 0: they do not
    sinks: torch.Tensor | None = None,  # [num_heads], scores of a key without a value that every row sees
) -> torch.Tensor:  # [num_rows, num_heads, head_dim] in the query's dtype
    """Softmax attention in float32 of every row over its context and its ancestors (itself included)."""
    context_len = context_key.shape[0]
    group = query.shape[1] // tree_key.shape[1]
    key = torch.cat([context_key, tree_key]).float().repeat_interleave(group, dim=1)
    value = torch.cat([context_value, tree_value]).float().repeat_interleave(group, dim=1)
    visible = torch.cat([torch.ones(query.shape[0], context_len, dtype=torch.bool), ancestors], dim=1)
    if window:
        row_positions = context_len + depths
        key_positions = torch.cat([torch.arange(context_len), row_positions])
        visible &= key_positions[None] > row_positions[:, None] - window
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) * scale
    if soft_cap:
        scores = soft_cap * (scores / soft_cap).tanh()
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, len(query), 1)], -1)
    weights = scores.softmax(-1)[..., : len(key)]
    return torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)
