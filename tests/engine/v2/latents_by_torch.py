"""vLLM's kernel that writes latents to the cache is compiled for GPUs: here plain torch does it."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from vllm import _custom_ops

from tests.engine.v2 import graphs


@contextmanager
def installed() -> Iterator[None]:
    """In the place where vLLM's layers look for it."""
    with patch.object(_custom_ops, "concat_and_cache_mla", write):
        yield


def write(
    latent: torch.Tensor,  # [at least as many as slots, rank]
    rope: torch.Tensor,  # likewise, rope_dim
    cache: torch.Tensor,  # [num_blocks, block_size, rank + rope_dim]
    slots: torch.Tensor,  # [num_tokens] int64, -1: nowhere
    kv_cache_dtype: str,
    scale: torch.Tensor,
) -> None:
    """In the place of `concat_and_cache_mla`."""
    assert kv_cache_dtype == "auto"
    graphs.kernel(_write)(latent, rope, cache, slots)


def _write(latent: torch.Tensor, rope: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    rows = (slots >= 0).nonzero()[:, 0]
    cache[slots[rows] // cache.shape[1], slots[rows] % cache.shape[1]] = torch.cat([latent[rows], rope[rows]], -1)
