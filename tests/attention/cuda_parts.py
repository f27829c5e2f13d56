"""Parts of CUDA's attention and runner that need neither a model nor a GPU."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from vllm_eagle.algorithm.config import TreeConfig

LAYER = SimpleNamespace(layer_name="layer", _k_scale_float=1.0, _v_scale_float=1.0, _k_scale=torch.ones(1), _v_scale=torch.ones(1))


def new_impl(backend: Any, head_dim: int) -> Any:
    impl = backend.get_impl_cls().__new__(backend.get_impl_cls())
    impl.scale, impl.head_size, impl.kv_cache_dtype, impl.attn_type = head_dim**-0.5, head_dim, "auto", "decoder"
    impl.alibi_slopes, impl.sinks, impl.sliding_window, impl.logits_soft_cap = None, None, (-1, -1), None
    impl.vllm_flash_attn_version, impl.fa4_hd256 = 3, False
    return impl


def runner_with(
    impls: list[Any],
    block_size: int,
    heads: tuple[int, int, int] = (8, 2, 64),  # query heads, key heads, head dimension
    dtype: torch.dtype = torch.float16,
) -> Any:
    """What warm-up asks of a runner, whose model has a layer of each implementation."""
    from vllm_eagle.ops.move_slots import Caches, move_accepted

    num_heads, num_kv_heads, head_size = heads
    caches = [torch.zeros(2, block_size, num_kv_heads, 2 * head_size, dtype=dtype).transpose(1, 2) for _ in impls]
    layers = {
        str(i): SimpleNamespace(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, kv_cache=cache, impl=impl, **vars(LAYER)
        )
        for i, (cache, impl) in enumerate(zip(caches, impls, strict=True))
    }
    return SimpleNamespace(
        device=torch.device("cpu"),
        dtype=dtype,
        max_model_len=1024,
        compilation_config=SimpleNamespace(static_forward_context=layers),
        kv_cache_config=SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=list(layers))]),
        tree_config=TreeConfig(16),
        _moves=[(0, partial(move_accepted, Caches.of(caches)))],
    )
