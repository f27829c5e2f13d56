"""FlashAttention's kernels are compiled for GPUs: here plain torch does what they are asked for, from what they would get.

They stand in for the third version, which Hopper runs: with a schedule that is made before, and stays where it is for graphs.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from vllm.utils.math_utils import round_up
from vllm.v1.attention.backends import flash_attn

from tests.engine.v2 import graphs

_VERSION = 3


@contextmanager
def installed(with_xformers: bool) -> Iterator[None]:
    """In the places where vLLM's FlashAttention looks for its kernels; plain torch in those of xformers, too, if asked for."""
    stands_in: dict[str, Callable[..., Any]] = {
        "flash_attn_varlen_func": attention,
        "get_scheduler_metadata": schedule,
        "reshape_and_cache_flash": write,
        "get_flash_attn_version": lambda *args, **kwargs: _VERSION,
    }
    with ExitStack() as stack:
        for name, function in stands_in.items():
            stack.enter_context(patch.object(flash_attn, name, function, create=True))
        if with_xformers:
            from tests.attention.xformers_by_torch import replace_kernels

            replace_kernels(stack.enter_context(pytest.MonkeyPatch.context()))
        yield


def schedule(*, batch_size: int, max_seqlen_q: int, **others: Any) -> torch.Tensor:
    """As long as the third version's; of it here is only for how many requests, of how many rows, it was made."""
    made = torch.zeros(1 + round_up(batch_size, 4) * 4, dtype=torch.int32)
    made[0], made[1] = batch_size, max_seqlen_q
    return made


def attention(
    q: torch.Tensor,  # [rows, num_heads, head_dim]
    k: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,  # [num_reqs + 1] int32
    max_seqlen_q: int,
    seqused_k: torch.Tensor,  # [num_reqs] int32
    max_seqlen_k: int,
    block_table: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    fa_version: int,
    out: torch.Tensor | None = None,
    softcap: float = 0.0,
    scheduler_metadata: torch.Tensor | None = None,
    return_softmax_lse: bool = False,
    **others: Any,
) -> Any:
    """What `flash_attn_varlen_func` returns; windows, sinks and the rest are none of this test bed's."""
    assert fa_version == _VERSION
    assert not any(others.get(name) for name in ("alibi_slopes", "s_aux", "mask_mod", "dynamic_causal"))
    assert tuple(others.get("window_size") or (-1, -1)) == (-1, -1)
    out = torch.empty_like(q) if out is None else out
    log_sums = torch.empty(q.shape[1], len(q))
    graphs.kernel(attend)(
        out, log_sums, q, k, v, cu_seqlens_q, seqused_k, block_table, scheduler_metadata,
        most_rows=max_seqlen_q, longest=max_seqlen_k, scale=softmax_scale, causal=causal, soft_cap=softcap,
    )  # fmt: skip
    return (out, log_sums) if return_softmax_lse else out


def attend(
    out: torch.Tensor,
    log_sums: torch.Tensor,  # [num_heads, rows]
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    made: torch.Tensor | None,
    *,
    most_rows: int,
    longest: int,
    scale: float,
    causal: bool,
    soft_cap: float,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Rows of every request over its tokens in the cache, computed in `dtype`."""
    places, group = starts.tolist(), query.shape[1] // keys.shape[2]
    if made is not None:
        assert made[:2].tolist() == [len(lengths), most_rows], "a schedule of another batch"
    assert int(starts.diff().max()) <= most_rows
    for i, length in enumerate(lengths.tolist()):
        own = slice(places[i], places[i + 1])
        rows = own.stop - own.start
        if not rows:
            continue
        assert length <= longest
        position = torch.arange(length)
        at = block_table[i, position // keys.shape[1]].long(), position % keys.shape[1]
        key, value = (x[at].to(dtype).repeat_interleave(group, 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", query[own].to(dtype), key) * scale
        scores = soft_cap * (scores / soft_cap).tanh() if soft_cap else scores
        if causal:
            scores = scores.masked_fill(position > torch.arange(length - rows, length)[:, None], -torch.inf)
        # Of an empty context it says that the sum is infinite, and vLLM's merge knows that.
        log_sums[:, own] = scores.logsumexp(-1) if length else torch.inf
        out[own] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).to(out.dtype)


def write(
    key: torch.Tensor,  # [at least as many as slots, num_kv_heads, head_dim]
    value: torch.Tensor,
    key_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    value_cache: torch.Tensor,
    slots: torch.Tensor,  # [num_tokens] int64, -1: nowhere
    *scales: Any,
) -> None:
    """In the place of `reshape_and_cache_flash`."""
    graphs.kernel(_write)(key, value, key_cache, value_cache, slots)


def _write(key: torch.Tensor, value: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, slots: torch.Tensor) -> None:
    rows = (slots >= 0).nonzero()[:, 0]
    at = slots[rows] // key_cache.shape[1], slots[rows] % key_cache.shape[1]
    key_cache[at], value_cache[at] = key[rows], value[rows]
