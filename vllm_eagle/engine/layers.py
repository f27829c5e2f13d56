"""Which attention layers keep tree nodes in the paged cache: those of the target; and whether the head's let go of blocks."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig


def target_layers(
    kv_cache_config: KVCacheConfig, layers: Mapping[str, Any], of_the_head: Collection[str]
) -> Iterator[tuple[int, list[Any]]]:
    """By group of the cache: together those layers whose caches have one shape. The head's own layer keeps no nodes.

    Args:
        kv_cache_config: has names of layers by group.
        layers: all of them, by name.
        of_the_head: names.
    """
    for gid, group in enumerate(kv_cache_config.kv_cache_groups):
        own = [layers[name] for name in group.layer_names if name not in of_the_head]
        by_shape: dict[torch.Size, list[Any]] = {}
        for layer in {layer.kv_cache.data_ptr(): layer for layer in own}.values():  # those that share a cache once
            by_shape.setdefault(layer.kv_cache.shape, []).append(layer)
        for alike in by_shape.values():
            yield gid, alike


def blocks_are_given_back(kv_cache_config: KVCacheConfig, of_the_head: Collection[str]) -> bool:
    """Whether requests lose blocks of the head's layers while they run, to whoever asks: those that have fallen out of a window."""
    for group in kv_cache_config.kv_cache_groups:
        found = getattr(group.kv_cache_spec, "kv_cache_specs", {})  # by layer, where those of a group differ
        specs = [found.get(name, group.kv_cache_spec) for name in group.layer_names if name in of_the_head]
        if not all(isinstance(spec, FullAttentionSpec) for spec in specs):
            return True
    return False
