"""Attention whose answer depends on what a row sees alone: not on the kernel, the batch, or the order in which keys come.

Computed in float64 and rounded once to the model's type. vLLM's kernels and ours differ in the last bit, which layers that quantize
their input make steps of: so differences of the engine itself would drown. Here nothing but the engine can make any.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from vllm.v1.attention.backends import triton_attn

from tests.engine.v2.flash_by_torch import attend
from vllm_eagle.ops import tree_attention


@contextmanager
def installed() -> Iterator[None]:
    """In the places of vLLM's Triton kernel and of ours."""
    with patch.object(triton_attn, "unified_attention", _rows), patch.object(tree_attention, "tree_attention", _trees):
        yield


def _rows(
    *,
    q: torch.Tensor,  # [rows, num_heads, head_dim]
    k: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,  # [num_reqs + 1] int32
    max_seqlen_q: int,
    seqused_k: torch.Tensor,  # [num_reqs] int32
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    block_table: torch.Tensor,
    softcap: float,
    **others: Any,
) -> None:
    """As `unified_attention`; windows, sinks and the rest are none of this test bed's."""
    assert tuple(window_size) == (-1, -1)
    assert not any(others.get(name) is not None for name in ("alibi_slopes", "sinks", "qq_bias", "k_scale_cache"))
    attend(
        out, q.new_empty(q.shape[1], len(q), dtype=torch.float64), q, k, v, cu_seqlens_q, seqused_k, block_table, None,
        most_rows=max_seqlen_q, longest=max_seqlen_k, scale=softmax_scale, causal=causal, soft_cap=softcap, dtype=torch.float64,
    )  # fmt: skip


def _trees(*arguments: Any, **options: Any) -> None:
    """As `tree_attention`."""
    *arguments, _ = arguments  # the longest context is not needed
    tree_attention.reference(*arguments, **options, dtype=torch.float64)
