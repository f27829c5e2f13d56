"""Random inputs for every kernel, and its answer beside the reference's: the tests run them through Triton's interpreter,
`vllm-eagle gpu-check` on a GPU.

Shapes cover what serving meets: ragged batches, trees of the root alone, empty contexts, contexts of many blocks, all head sizes,
caches of all types and layouts, windows, soft caps, sinks.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from vllm_eagle.ops.rows import TreeRows

Pair = tuple[torch.Tensor, torch.Tensor]  # what the kernel found, what the reference says


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison; `run` draws the inputs from a seed."""

    name: str
    run: Callable[[torch.device, int], list[Pair]]
    tolerance: float = 0.0  # absolute and relative; 0: equal

    def error(self, device: torch.device, seed: int) -> float:
        """Greatest difference as a multiple of the tolerance; 0 or infinity where all must be equal. Above 1 is a failure."""
        worst = 0.0
        for found, expected in self.run(device, seed):
            if found.shape != expected.shape:
                return float("inf")
            if self.tolerance == 0:
                worst = max(worst, 0.0 if torch.equal(found.cpu(), expected.cpu()) else float("inf"))
                continue
            found, expected = found.cpu().float(), expected.cpu().float()
            off = (found - expected).abs() / (self.tolerance * (1 + expected.abs()))
            off = torch.where(found.eq(expected) | (found.isnan() & expected.isnan()), 0.0, off).nan_to_num(nan=float("inf"))
            worst = max(worst, float(off.max()) if off.numel() else 0.0)
        return worst


def all_cases() -> Iterator[Case]:
    """Every kernel, from small to large."""
    yield from _attention_cases()
    yield from _latent_cases()
    yield Case("move_slots", _move_slots)
    yield Case("move_slots of latents", _move_latents)
    for rows, vocab, topk, noisy in ((1, 40, 8, False), (5, 4096, 8, True), (3, 10_000, 1, False), (2, 70, 64, True)):
        name = f"best_children rows={rows} vocab={vocab} topk={topk} noise={noisy}"
        yield Case(name, lambda d, s, a=(rows, vocab, topk, noisy): _best_children(d, s, *a), 1e-5)  # type: ignore[misc]
    for drafted, nodes, num_reqs in ((0, 4, 3), (8, 1, 3), (30, 17, 3), (500, 61, 3), (30, 17, 0)):
        name = f"rerank drafted={drafted} nodes={nodes} requests={num_reqs}"
        yield Case(name, lambda d, s, a=(drafted, nodes, num_reqs): _rerank(d, s, *a))  # type: ignore[misc]
    for num_reqs in (16, 0):
        yield Case(f"walk requests={num_reqs}", lambda d, s, n=num_reqs: _walk(d, s, n))  # type: ignore[misc]


# ---- tree attention

Sizes = list[tuple[int, int]]  # nodes and context of each tree


@dataclass(frozen=True, slots=True)
class Attention:
    """One shape of tree attention."""

    sizes: Sizes
    heads: tuple[int, int, int] = (8, 2, 64)  # query heads, key heads, head dimension
    dtype: torch.dtype = torch.float32
    block_size: int = 16
    token_major: bool = False  # layout of the cache: tokens outside of heads
    window: int = 0
    soft_cap: float = 0.0
    sinks: bool = False
    fp8: bool = False
    num_splits: int | None = None
    levels: bool = False  # rows see more keys than there are rows, as in a level of the drafter


_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def _attention_cases() -> Iterator[Case]:
    ragged = [(17, 100), (1, 33), (5, 1), (61, 257), (3, 0)]
    shapes = (
        Attention([(1, 40)]),
        Attention(ragged),
        Attention(ragged, num_splits=3),
        Attention(ragged, dtype=torch.bfloat16, token_major=True, num_splits=2),
        Attention(ragged, dtype=torch.float16, heads=(4, 4, 32)),
        Attention([(8, 31), (24, 32)], heads=(3, 1, 80), block_size=32),
        Attention([(9, 70)], heads=(4, 1, 256), dtype=torch.bfloat16),
        Attention([(20, 70)], heads=(4, 1, 256)),
        Attention([(33, 1100), (2, 1024)], heads=(8, 2, 128), dtype=torch.bfloat16, num_splits=8),
        Attention(ragged, soft_cap=5.0),
        Attention(ragged, window=8, num_splits=2),
        Attention([(20, 90), (4, 3)], window=40, soft_cap=3.0),
        Attention(ragged, sinks=True, num_splits=2),
        Attention(ragged, sinks=True, window=8, heads=(8, 1, 64), dtype=torch.bfloat16),
        Attention(ragged, dtype=torch.bfloat16, fp8=True, num_splits=2),
        Attention(ragged, levels=True),
        Attention(ragged, levels=True, num_splits=3, window=12, dtype=torch.float16),
        Attention([(9, 70), (2, 300)], levels=True, num_splits=2, heads=(8, 2, 128), dtype=torch.bfloat16, token_major=True),
    )
    alone = (
        Attention(ragged),
        Attention(ragged, window=4, soft_cap=5.0, dtype=torch.float16),
        Attention([(33, 40), (2, 10)], heads=(8, 2, 128), dtype=torch.bfloat16),
    )
    no_fp8 = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9)
    yield Case("tree_attention no trees", lambda d, s: [run_attention(Attention([(3, 9)]), d, s, num_trees=0)])
    yield Case("own_attention no trees", lambda d, s: own_attention(Attention([(3, 9)]), d, s, num_trees=0))
    runs = [("tree_attention", shape, _run_whole) for shape in shapes]
    runs += [("own_attention", shape, own_attention) for shape in alone]
    for kernel, shape, run in runs:
        if shape.fp8 and no_fp8:
            continue
        if os.environ.get("TRITON_INTERPRET") == "1" and shape.dtype == torch.bfloat16:  # whose products the interpreter gets wrong
            shape = replace(shape, dtype=torch.float16)
        name = f"{kernel} {shape}".replace("Attention", "").replace("torch.", "")
        yield Case(name, lambda d, s, a=shape, run=run: run(a, d, s), _TOLERANCE[shape.dtype])  # type: ignore[misc]


def _latent_cases() -> Iterator[Case]:
    """Heads are (query heads, numbers of a latent, of them rotated)."""
    ragged = [(17, 40), (1, 33), (5, 1), (3, 0)]
    shapes = (
        Attention(ragged, heads=(4, 96, 32)),
        Attention(ragged, heads=(3, 96, 32), num_splits=3, levels=True),
        Attention(ragged, heads=(2, 96, 32), num_splits=2, dtype=torch.float16),
        Attention([(9, 70), (2, 10)], heads=(16, 576, 64), block_size=64),
        Attention([(9, 70), (2, 300)], heads=(16, 576, 64), block_size=64, dtype=torch.bfloat16, num_splits=4),
    )
    yield Case("latent_tree_attention no trees", lambda d, s: [run_latent(Attention([(3, 9)], (2, 96, 32)), d, s, num_trees=0)])
    for shape in shapes:
        if os.environ.get("TRITON_INTERPRET") == "1" and shape.dtype == torch.bfloat16:  # whose products the interpreter gets wrong
            shape = replace(shape, dtype=torch.float16)
        name = f"latent_tree_attention {shape}".replace("Attention", "").replace("torch.", "")
        yield Case(name, lambda d, s, a=shape: [run_latent(a, d, s)], _TOLERANCE[shape.dtype])  # type: ignore[misc]


def run_latent(shape: Attention, device: torch.device, seed: int, num_trees: int | None = None) -> Pair:
    """Both outputs of the first trees over latents, rows of no tree included; those must stay as they were."""
    from vllm_eagle.ops import latent_tree_attention

    num_heads, width, rope_dim = shape.heads
    query, key, _, kv_cache, rows = attention_inputs(replace(shape, heads=(num_heads, 1, width)), device, seed)
    rows, cache = first_trees(rows, num_trees), kv_cache[:, 0, :, :width]
    longest = max(context for _, context in shape.sizes)
    found, expected = (torch.full_like(query[..., : width - rope_dim], 7.0) for _ in range(2))
    latent_tree_attention.latent_tree_attention(
        query, key[:, 0], cache, rows, width**-0.5, found, longest, num_splits=shape.num_splits
    )
    latent_tree_attention.reference(query, key[:, 0], cache, rows, width**-0.5, expected)
    return found, expected


def _run_whole(shape: Attention, device: torch.device, seed: int) -> list[Pair]:
    return [run_attention(shape, device, seed)]


def run_attention(shape: Attention, device: torch.device, seed: int, num_trees: int | None = None) -> Pair:
    """Both outputs of the first trees, rows of no tree included; those must stay as they were."""
    from vllm_eagle.ops import tree_attention

    query, key, value, kv_cache, rows = attention_inputs(shape, device, seed)
    rows = first_trees(rows, num_trees)
    scale = shape.heads[2] ** -0.5
    options: dict[str, Any] = {"soft_cap": shape.soft_cap, "window": shape.window}
    if shape.fp8:
        options |= {"key_scale": 0.5, "value_scale": 0.25}
    if shape.sinks:
        generator = torch.Generator(device).manual_seed(seed + 1)
        options["sinks"] = 3 * torch.randn(shape.heads[0], generator=generator, device=device, dtype=shape.dtype)
    found, expected = (torch.full_like(query, 7.0) for _ in range(2))
    longest = max(context for _, context in shape.sizes)
    tree_attention.tree_attention(query, key, value, kv_cache, rows, scale, found, longest, num_splits=shape.num_splits, **options)
    tree_attention.reference(query, key, value, kv_cache, rows, scale, expected, **options)
    return found, expected


def own_attention(shape: Attention, device: torch.device, seed: int, num_trees: int | None = None) -> list[Pair]:
    """Attention of the first trees' rows over their own keys, and log-sums; the trees in another order than in the batch."""
    from vllm_eagle.ops import tree_attention

    query, key, value, kv_cache, rows = attention_inputs(shape, device, seed)
    rows = first_trees(rows, num_trees)
    options: dict[str, Any] = {"scale": shape.heads[2] ** -0.5, "soft_cap": shape.soft_cap, "window": shape.window}
    counts = rows.num_rows.flip(0)
    places = (counts.cumsum(0) - counts).flip(0).to(torch.int32)
    num_places = int(counts.sum())
    found, sums = tree_attention.own_attention(query, key, value, kv_cache, rows, places=places, num_places=num_places, **options)
    every, every_sum = torch.zeros(query.shape, device=device), torch.zeros(query.shape[1], len(query), device=device)
    without_context = replace(rows, context_lens=torch.zeros_like(rows.context_lens))
    tree_attention.reference(query, key, value, kv_cache, without_context, output=every, log_sums=every_sum, **options)
    expected, expected_sums = torch.zeros_like(found), torch.zeros_like(sums)
    for first, at, number in zip(rows.first_rows.tolist(), places.tolist(), rows.num_rows.tolist(), strict=True):
        expected[at : at + number] = every[first : first + number]
        expected_sums[:, at : at + number] = every_sum[:, first : first + number]
    return [(found, expected), (sums, expected_sums)]


def first_trees(rows: TreeRows, number: int | None) -> TreeRows:
    """The first trees of a batch; None: all of them."""
    return rows if number is None else TreeRows(*(getattr(rows, field.name)[:number] for field in fields(rows)))


def attention_inputs(
    shape: Attention, device: torch.device, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, TreeRows]:
    """Query, key, value, cache and rows; blocks in random order, rows of trees apart, all three slices of one projection."""
    generator = torch.Generator(device).manual_seed(seed)
    num_heads, num_kv_heads, head_dim = shape.heads

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=shape.dtype)

    nodes, contexts = (torch.tensor(x) for x in zip(*shape.sizes, strict=True))
    blocks = (contexts + nodes + shape.block_size - 1) // shape.block_size
    order = torch.randperm(int(blocks.sum()), generator=generator, device=device).cpu().to(torch.int32) + 1
    table = torch.zeros(len(nodes), int(blocks.max()), dtype=torch.int32)
    for i, (count, end) in enumerate(zip(blocks.tolist(), blocks.cumsum(0).tolist(), strict=True)):
        table[i, :count] = order[end - count : end]
    num_blocks, content = len(order) + 1, 2 * head_dim
    if shape.token_major:
        kv_cache = random(num_blocks, shape.block_size, num_kv_heads, content).transpose(1, 2)
    else:
        kv_cache = random(num_blocks, num_kv_heads, shape.block_size, content)
    if shape.fp8:
        kv_cache = kv_cache.to(torch.float8_e4m3fn)
    most = int(nodes.max())
    if shape.levels:  # two rows of each tree see some of five earlier keys and themselves
        num_rows, num_keys = torch.full_like(nodes, 2), torch.full_like(nodes, 7)
        visible = torch.rand(len(nodes), 2, 7, generator=generator, device=device) < 0.5
        visible[:, :, 5:] = torch.eye(2, dtype=torch.bool, device=device)
    else:
        num_rows = num_keys = nodes
        visible = torch.stack([random_ancestors(most, seed + i) for i in range(len(nodes))]).to(device)
    first_rows = num_rows.cumsum(0) - num_rows + 3 + 2 * torch.arange(len(nodes))
    first_keys = num_keys.cumsum(0) - num_keys if shape.levels else first_rows
    num_tokens = int(first_rows[-1] + num_rows[-1]) + 2
    if shape.levels:
        query = random(num_tokens, num_heads, head_dim)
        key, value = (random(int(num_keys.sum()), num_kv_heads, head_dim) for _ in range(2))
    else:
        projection = random(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
        query, key, value = projection.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    rows = TreeRows(*(x.to(device) for x in (table, contexts, first_rows, num_rows, first_keys, num_keys, visible)))
    return query, key, value, kv_cache, rows


def random_ancestors(size: int, seed: int) -> torch.Tensor:
    """Of a random tree: [size, size] bool."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.eye(size, dtype=torch.bool)
    for node in range(1, size):
        mask[node] |= mask[int(torch.randint(0, node, (1,), generator=generator))]
    return mask


# ---- the others


def _move_slots(device: torch.device, seed: int) -> list[Pair]:
    from vllm_eagle.ops.move_slots import Caches, move_accepted, reference

    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for dtype, token_major in ((torch.bfloat16, False), (torch.float32, True), (torch.uint8, False)):
        shape = (40, 8, 2, 48) if token_major else (40, 2, 8, 48)
        caches = [torch.randint(0, 100, shape, generator=generator).to(dtype).to(device) for _ in range(3)]
        caches = [cache.transpose(1, 2) if token_major else cache for cache in caches]
        expected = [cache.clone() for cache in caches]
        table = torch.randperm(39, generator=generator)[:36].view(4, 9).to(torch.int32)
        context_lens = torch.tensor([0, 5, 23, 40])
        paths = torch.zeros(4, 5, dtype=torch.int32)
        for row, length in enumerate((0, 5, 3, 2)):
            paths[row, :length] = torch.randperm(24, generator=generator)[:length].sort().values + 1
        move_accepted(Caches.of([*caches, caches[0]]), table.to(device), context_lens.to(device), paths.to(device))
        reference([*expected, expected[0]], table, context_lens, paths)
        pairs += list(zip(caches, expected, strict=True))
    return pairs


def _move_latents(device: torch.device, seed: int) -> list[Pair]:
    """One row of a token: to compaction a cache of latents is one of a single head."""
    from vllm_eagle.ops.move_slots import Caches, move_accepted, reference

    generator = torch.Generator().manual_seed(seed)
    caches = [torch.randn(9, 8, 576, generator=generator).to(torch.bfloat16).to(device)[:, None] for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    table = torch.randperm(8, generator=generator).view(2, 4).to(torch.int32)
    context_lens, paths = torch.tensor([3, 14]), torch.tensor([[2, 5, 9], [1, 12, 0]], dtype=torch.int32)
    move_accepted(Caches.of(caches), table.to(device), context_lens.to(device), paths.to(device))
    reference(expected, table, context_lens, paths)
    return list(zip(caches, expected, strict=True))


def _best_children(device: torch.device, seed: int, rows: int, vocab: int, topk: int, noisy: bool) -> list[Pair]:
    from vllm_eagle.ops.best_children import best_children, reference

    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 3, vocab, generator=generator).to(torch.bfloat16)  # coarse: some are equal
    logits[0, 0, : vocab // 2] = float("-inf")
    logits[0, 2] = float("nan")
    factors = torch.rand(rows, generator=generator) + 0.5
    noise = torch.randn(rows, vocab, generator=generator) if noisy else None
    values, tokens = best_children(logits.to(device), factors.to(device), None if noise is None else noise.to(device), topk)
    expected, expected_tokens = reference(logits, factors, noise, topk)
    # Which tokens stand where nothing is left, or nothing is a number, means nothing; but they are tokens.
    tokens, is_token = tokens.cpu(), expected > float("-inf")
    known = (tokens >= 0) & (tokens < vocab)
    return [(values, expected), (tokens[is_token], expected_tokens[is_token]), (known, torch.ones_like(known))]


def _rerank(device: torch.device, seed: int, drafted: int, nodes: int, num_reqs: int) -> list[Pair]:
    from vllm_eagle.ops.rerank import reference, rerank

    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 1000, (num_reqs, drafted), generator=generator)
    parents = torch.full((num_reqs, drafted), -1)
    scores = torch.zeros(num_reqs, drafted)
    depth = torch.zeros(num_reqs, drafted + 1, dtype=torch.long)  # by place, the root last
    for place in range(drafted):
        above = torch.randint(-1, place, (num_reqs,), generator=generator) if place else torch.full((num_reqs,), -1)
        above = torch.where(depth.gather(1, above[:, None] % (drafted + 1))[:, 0] >= 8, -1, above)  # at most so deep
        parents[:, place], depth[:, place] = above, depth.gather(1, above[:, None] % (drafted + 1))[:, 0] + 1
        step = torch.randint(0, 4, (num_reqs,), generator=generator) / 4  # coarse: some are equal
        scores[:, place] = torch.where(above < 0, 0.0, scores.gather(1, above.clamp(min=0)[:, None])[:, 0]) - step
    if drafted > 20:
        scores[:1, 6:] = float("-inf")
    inputs: Any = (torch.tensor([5, 6, 7])[:num_reqs], tokens, scores, parents, torch.tensor([nodes, nodes // 2, 0])[:num_reqs])
    sizes: Any = {"max_nodes": nodes + 1, "max_depth": 8}
    found, expected = rerank(*(x.to(device) for x in inputs), **sizes), reference(*inputs, **sizes)
    return [(getattr(found, name), getattr(expected, name)) for name in found.__slots__]


def _walk(device: torch.device, seed: int, num_reqs: int) -> list[Pair]:
    from vllm_eagle.ops.walk import reference, walk

    generator = torch.Generator().manual_seed(seed)
    max_nodes, max_depth = 24, 6
    token_ids, target_ids = torch.zeros(num_reqs, max_nodes, dtype=torch.long), torch.zeros(num_reqs, max_nodes, dtype=torch.long)
    parents = torch.zeros(num_reqs, max_nodes, dtype=torch.long)
    for request in range(num_reqs):
        depth, children = [0] * max_nodes, [0] * max_nodes
        for node in range(1, max_nodes):
            shallow = [n for n in range(node) if depth[n] < max_depth]
            above = shallow[int(torch.randint(0, len(shallow), (1,), generator=generator))]
            parents[request, node], depth[node] = above, depth[above] + 1
            token_ids[request, node] = children[above]  # siblings hold distinct tokens
            children[above] += 1
        target_ids[request] = torch.tensor([int(torch.randint(0, n + 1 + (n == 0), (1,), generator=generator)) for n in children])
    num_nodes = torch.randint(1, max_nodes + 1, (num_reqs,), generator=generator)
    inputs: Any = (token_ids, parents, num_nodes, target_ids)
    sizes: Any = {"max_depth": max_depth}
    found, expected = walk(*(x.to(device) for x in inputs), **sizes), reference(*inputs, **sizes)
    return list(zip(found, expected, strict=True))
