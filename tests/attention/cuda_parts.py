"""Parts of CUDA's attention and runner that need neither a model nor a GPU."""

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
    vocab_size: int = 40,
) -> Any:
    """A runner whose model has a layer of each implementation."""
    from vllm_eagle.engine.v1.gpu_runner import EagleTreeGPUModelRunner
    from vllm_eagle.ops.move_slots import Caches

    num_heads, num_kv_heads, head_size = heads
    caches = [torch.zeros(2, block_size, num_kv_heads, 2 * head_size, dtype=dtype).transpose(1, 2) for _ in impls]
    layers = {
        str(i): SimpleNamespace(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, kv_cache=cache, impl=impl, **vars(LAYER)
        )
        for i, (cache, impl) in enumerate(zip(caches, impls, strict=True))
    }
    runner = EagleTreeGPUModelRunner.__new__(EagleTreeGPUModelRunner)
    runner.device, runner.dtype, runner.max_model_len = torch.device("cpu"), dtype, 1024
    runner.compilation_config = SimpleNamespace(static_forward_context=layers)
    runner.kv_cache_config = SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=list(layers))])
    runner._caches = [(0, Caches.of(caches))] if caches else []
    runner.model_config, runner.tree_config = SimpleNamespace(get_vocab_size=lambda: vocab_size), TreeConfig(16)
    return runner
