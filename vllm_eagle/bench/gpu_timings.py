"""How fast the Triton kernels are on this GPU, in the shapes of an 8B model.

Times are medians over launches between CUDA events, over several sets of inputs that together are larger than the GPU's cache. Tree
attention is held against streaming its context once at the bandwidth that a copy reaches here. Not run on a GPU yet.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

_HEADS = (32, 8, 128)  # of an 8B Llama: query heads, key heads, head dimension
_CONTEXTS, _BATCHES, _NODES = (1024, 8192, 32768), (1, 8, 64), (1, 8, 16, 32, 64)
_SLEEP_CYCLES = 2_000_000  # about a millisecond
_WARM_UP, _LAUNCHES, _SETS_BYTES = 5, 30, 256 << 20
_MOST_BYTES = 24 << 30  # of one set of keys and values; larger ones are left out


def timings(device: torch.device) -> dict[str, Any]:
    """Bandwidth of a copy in bytes per second, and microseconds of every kernel."""
    bandwidth = copy_bandwidth(device)
    print(f"copy: {bandwidth / 1e9:.0f} GB/s", file=sys.stderr, flush=True)
    attention = []
    for context in _CONTEXTS:
        for batch in _BATCHES:
            if kv_bytes(batch, context) <= _MOST_BYTES:
                attention += time_attention(device, batch, context, bandwidth)
    return {"copy_bytes_per_s": bandwidth, "tree_attention": attention, "others_us": time_others(device)}


def microseconds(launches: Sequence[Callable[[], object]]) -> float:
    """Median over all launches, which take turns on their inputs."""
    for launch in launches:
        for _ in range(_WARM_UP):
            launch()
    times = []
    for turn in range(max(_LAUNCHES, len(launches))):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_SLEEP_CYCLES)  # so that all is queued before the first of it runs: no launch is timed
        start.record()
        launches[turn % len(launches)]()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds([lambda: target.copy_(source)]) * 1e6


def kv_bytes(batch: int, context: int) -> int:
    """Of keys and values of one layer, in 16 bits."""
    return 4 * batch * context * _HEADS[1] * _HEADS[2]


def time_attention(device: torch.device, batch: int, context: int, bandwidth: float) -> list[dict[str, Any]]:
    """Trees of several sizes, against one row and against streaming the context once."""
    from vllm_eagle.ops.cases import Attention, attention_inputs
    from vllm_eagle.ops.tree_attention import tree_attention

    found: list[dict[str, Any]] = []
    sets = max(1, min(8, _SETS_BYTES // kv_bytes(batch, context)))
    for nodes in _NODES:
        shape = Attention([(nodes, context)] * batch, heads=_HEADS, dtype=torch.bfloat16)
        launches = []
        for seed in range(sets):
            query, key, value, kv_cache, rows = attention_inputs(shape, device, seed)
            output = torch.empty_like(query)
            inputs = (query, key, value, kv_cache, rows, _HEADS[2] ** -0.5, output, context)
            launches.append(partial(tree_attention, *inputs))
        spent = microseconds(launches)
        stream = kv_bytes(batch, context) / bandwidth * 1e6
        found.append(
            {
                "batch": batch,
                "context": context,
                "nodes": nodes,
                "us": round(spent, 2),
                "times_one_row": round(spent / found[0]["us"], 3) if found else 1.0,
                "times_streaming": round(spent / stream, 3),
                "bytes_per_s": round(kv_bytes(batch, context) / spent * 1e6),
            }
        )
        print(f"tree_attention {found[-1]}", file=sys.stderr, flush=True)
    return found


def time_others(device: torch.device) -> dict[str, float]:
    """Microseconds of the other kernels in the shape of an 8B model, 60 nodes and 8 levels, by number of requests."""
    from vllm_eagle.ops.best_children import best_children
    from vllm_eagle.ops.move_slots import Caches, move_accepted
    from vllm_eagle.ops.rerank import rerank
    from vllm_eagle.ops.walk import walk

    found: dict[str, float] = {}
    for batch in _BATCHES:
        logits = torch.randn(batch, 8, 128_256, dtype=torch.bfloat16, device=device)
        factors, noise = torch.ones(batch, device=device), torch.randn(batch, 128_256, device=device)
        found[f"best_children batch={batch}"] = microseconds([partial(best_children, logits, factors, noise, 8)])
        tokens = torch.randint(0, 1000, (batch, 456), device=device)
        scores = -torch.rand(batch, 456, device=device).cumsum(1)
        parents = torch.arange(-1, 455, device=device).expand(batch, -1).contiguous() // 8
        roots, budgets = torch.zeros(batch, dtype=torch.long, device=device), torch.full((batch,), 60, device=device)
        drafted = (roots, tokens, scores, parents, budgets)
        found[f"rerank batch={batch}"] = microseconds([partial(rerank, *drafted, 61, 8)])
        trees = rerank(*drafted, 61, 8)
        target_ids = torch.zeros_like(trees.token_ids)
        found[f"walk batch={batch}"] = microseconds(
            [partial(walk, trees.token_ids, trees.parents, trees.num_nodes, target_ids, max_depth=8)]
        )
        caches = Caches.of([torch.zeros(8 * batch, 8, 16, 256, dtype=torch.bfloat16, device=device) for _ in range(32)])
        table = torch.arange(8 * batch, dtype=torch.int32, device=device).view(batch, 8)
        context_lens = torch.full((batch,), 40, device=device)
        paths = torch.tensor([2, 7, 12, 17, 22], dtype=torch.int32, device=device).expand(batch, -1).contiguous()
        found[f"move_accepted batch={batch}"] = microseconds([partial(move_accepted, caches, table, context_lens, paths)])
    return {name: round(spent, 2) for name, spent in found.items()}
