"""How fast the Triton kernels are on this GPU, in the shapes of an 8B model.

Times are medians over launches between CUDA events, over several sets of inputs that together are larger than the GPU's cache. Tree
attention is held against streaming its context once at the bandwidth that a copy reaches here. Shapes for which there is no memory
are named and left out. Not run on a GPU yet.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from vllm_eagle.ops.cases import Attention, attention_inputs

_HEADS = (32, 8, 128)  # of an 8B Llama: query heads, key heads, head dimension
_CONTEXTS, _BATCHES, _NODES = (1024, 8192, 32768), (1, 8, 64), (1, 8, 16, 32, 64)
_SLEEP_CYCLES = 2_000_000  # about a millisecond
_WARM_UP, _LAUNCHES = 3, 30
_SETS_BYTES = 256 << 20  # of all sets together; the largest caches hold half of it
_FREE_SHARE = 0.8  # of free memory that keys and values may take


def timings(device: torch.device) -> Iterator[dict[str, Any]]:
    """Bandwidth of a copy in bytes per second, and microseconds of every kernel: what is known so far, after each measurement."""
    bandwidth = copy_bandwidth(device)
    print(f"copy: {bandwidth / 1e9:.0f} GB/s", file=sys.stderr, flush=True)
    found: dict[str, Any] = {"copy_bytes_per_s": bandwidth, "tree_attention": [], "others_us": {}}
    yield found
    for context in _CONTEXTS:
        for batch in _BATCHES:
            for row in time_attention(device, batch, context, bandwidth):
                print(f"tree_attention {row}", file=sys.stderr, flush=True)
                found["tree_attention"].append(row)
                yield found
    for batch in _BATCHES:
        for name, launch in other_kernels(device, batch):
            found["others_us"][f"{name} batch={batch}"] = round(microseconds([launch]), 2)
            yield found


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


def number_of_sets(batch: int, context: int) -> int:
    """Sets of inputs that together are larger than any cache of a GPU."""
    return -(-_SETS_BYTES // kv_bytes(batch, context))


def time_attention(device: torch.device, batch: int, context: int, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Trees of several sizes, against one row and against streaming the context once; or why they could not be timed."""
    sets = number_of_sets(batch, context)
    needed, free = sets * kv_bytes(batch, context), torch.cuda.mem_get_info(device)[0]
    shape = {"batch": batch, "context": context}
    if needed > _FREE_SHARE * free:
        yield shape | {"problem": f"{needed / 1e9:.1f} GB of keys and values, of {free / 1e9:.1f} GB that are free"}
        return
    one_row = None
    for nodes in _NODES:
        try:
            spent = microseconds(attention_launches(device, batch, context, nodes, sets))
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            yield shape | {"nodes": nodes, "problem": f"out of memory: {error}"}
            continue
        one_row = spent if nodes == 1 else one_row
        stream = kv_bytes(batch, context) / bandwidth * 1e6
        yield shape | {
            "nodes": nodes,
            "us": round(spent, 2),
            "times_one_row": None if one_row is None else round(spent / one_row, 3),
            "times_streaming": round(spent / stream, 3),
            "bytes_per_s": round(kv_bytes(batch, context) / spent * 1e6),
        }


def attention_launches(device: torch.device, batch: int, context: int, nodes: int, sets: int) -> list[Callable[[], object]]:
    """A launch per set of inputs; caches as vLLM lays them out by default, heads inside of tokens."""
    from vllm_eagle.ops.tree_attention import tree_attention

    shape = Attention([(nodes, context)] * batch, heads=_HEADS, dtype=torch.bfloat16, token_major=True)
    launches: list[Callable[[], object]] = []
    for seed in range(sets):
        query, key, value, kv_cache, rows = attention_inputs(shape, device, seed)
        output = torch.empty_like(query)
        launches.append(partial(tree_attention, query, key, value, kv_cache, rows, _HEADS[2] ** -0.5, output, context))
    return launches


def other_kernels(device: torch.device, batch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """The other kernels in the shape of an 8B model: 60 nodes, 8 levels of 8 expanded nodes."""
    from vllm_eagle.ops.best_children import best_children
    from vllm_eagle.ops.move_slots import Caches, move_accepted
    from vllm_eagle.ops.rerank import rerank
    from vllm_eagle.ops.walk import walk

    logits = torch.randn(batch, 8, 128_256, dtype=torch.bfloat16, device=device)
    factors, noise = torch.ones(batch, device=device), torch.randn(batch, 128_256, device=device)
    yield "best_children", partial(best_children, logits, factors, noise, 8)
    roots, budgets = torch.zeros(batch, dtype=torch.long, device=device), torch.full((batch,), 60, device=device)
    tokens, scores, parents = (x.to(device) for x in drafted_levels(batch, 8, 8, 8))
    drafted = partial(rerank, roots, tokens, scores, parents, budgets, 61, 8)
    yield "rerank", drafted
    trees = drafted()
    lengths = torch.arange(batch) % 6
    target_ids = accepted_to(trees.token_ids.cpu(), trees.parents.cpu(), trees.depths.cpu(), trees.num_nodes.cpu(), lengths)
    yield "walk", partial(walk, trees.token_ids, trees.parents, trees.num_nodes, target_ids.to(device), max_depth=8)
    caches = Caches.of([torch.zeros(8 * batch, 16, 8, 256, dtype=torch.bfloat16, device=device).transpose(1, 2) for _ in range(32)])
    table = torch.arange(8 * batch, dtype=torch.int32, device=device).view(batch, 8)
    context_lens = torch.full((batch,), 40, device=device)
    paths = torch.tensor([2, 7, 12, 17, 22], dtype=torch.int32, device=device).expand(batch, -1).contiguous()
    yield "move_accepted", partial(move_accepted, caches, table, context_lens, paths)


def drafted_levels(batch: int, depth: int, width: int, children: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, scores and parents [batch, drafted] of nodes whose first children are likely: trees of them are deep."""
    generator = torch.Generator().manual_seed(0)
    parents, scores = torch.full((batch, children), -1), -torch.arange(children).float().expand(batch, -1)
    for level in range(1, depth):
        start = 0 if level == 1 else children + (level - 2) * width * children
        above = start + torch.arange(width * children) // children
        steps = torch.rand(batch, width * children, generator=generator) / 2 + torch.arange(width * children) % children
        parents = torch.cat([parents, above.expand(batch, -1)], 1)
        scores = torch.cat([scores, scores[:, above] - steps], 1)
    tokens = torch.arange(parents.shape[1]).expand(batch, -1)
    return tokens.contiguous(), scores.contiguous(), parents.contiguous()


def accepted_to(
    token_ids: torch.Tensor,  # [batch, max_nodes] int64
    parents: torch.Tensor,  # [batch, max_nodes] int64
    depths: torch.Tensor,  # [batch, max_nodes] int64
    num_nodes: torch.Tensor,  # [batch] int64
    lengths: torch.Tensor,  # [batch] int64
) -> torch.Tensor:  # [batch, max_nodes] int64
    """What a target would have to sample after each node, so that paths of at most these lengths are accepted."""
    target_ids = torch.full_like(token_ids, -1)  # no token
    for tree, length in enumerate(lengths.tolist()):
        for node in range(int(num_nodes[tree]) - 1, 0, -1):  # of a node's children the first comes last, and stays
            if depths[tree, node] <= length:
                target_ids[tree, parents[tree, node]] = token_ids[tree, node]
    return target_ids
