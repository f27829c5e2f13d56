"""The CPU kernel and the packed cache against plain torch, on ragged batches of trees in vLLM's own block layout."""

from dataclasses import replace

import pytest
import torch
from vllm import _custom_ops as ops

from vllm_eagle import native
from vllm_eagle.algorithm.tree import node_depths
from vllm_eagle.attention import cpu_cache, cpu_kernel, reference
from vllm_eagle.ops.rows import TreeRows

BLOCK = 32


def packs_for_amx() -> bool:
    """vLLM's wheel holds a library per kind of CPU; the one for CPUs without bfloat16 instructions has no packing for AMX."""
    blocks = torch.zeros(2, 1, 1, BLOCK, 64, dtype=torch.bfloat16)
    data = torch.zeros(1, 1, 64, dtype=torch.bfloat16)
    try:
        ops.cpu_attn_reshape_and_cache(data, data, *blocks, torch.zeros(1, dtype=torch.long), "amx")
    except RuntimeError as error:
        if "Unsupported CPU attention configuration" in str(error):
            return False
        raise
    return True


AMX = pytest.mark.skipif(not packs_for_amx(), reason="vLLM's library for this CPU has no packing for AMX")


def random_parents(num_nodes: int, generator: torch.Generator) -> list[int]:
    return [0] + [int(torch.randint(0, node, (1,), generator=generator)) for node in range(1, num_nodes)]


def ancestors_of(parents: list[int], size: int) -> torch.Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    for node, parent in enumerate(parents):
        mask[node] |= mask[parent]
        mask[node, node] = True
    return mask


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With our C++ operators, which are built here wherever a compiler is, and without them."""
    assert native.problem() is None
    monkeypatch.setattr(native, "runs", lambda: request.param)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize(
    ("isa", "dtype"),  # AMX packs in pairs, in bfloat16 alone
    [("vec", torch.float32), ("vec", torch.bfloat16), ("vec", torch.float16), pytest.param("amx", torch.bfloat16, marks=AMX)],
)
@pytest.mark.parametrize("heads", [(6, 2, 64), (32, 8, 128), (4, 4, 32), (3, 1, 80)])
@pytest.mark.parametrize(
    "sizes",
    [
        [(1, 40)],  # (nodes, context)
        [(17, 100), (1, 33), (5, 1), (61, 257)],
        [(8, 31), (24, 32), (60, 64)],
        [(16, 1600), (3, 0)],  # a context that threads share
    ],
)
def test_tree_attention_equals_the_reference(
    isa: str, dtype: torch.dtype, heads: tuple[int, int, int], sizes: list[tuple[int, int]]
) -> None:
    compare_with_the_reference(isa, dtype, heads, sizes)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize(
    ("isa", "dtype"),
    [("vec", torch.float32), ("vec", torch.bfloat16), ("vec", torch.float16), pytest.param("amx", torch.bfloat16, marks=AMX)],
)
@pytest.mark.parametrize("block_size", [64, 128, 96])  # 128 is vLLM's own
def test_large_blocks_are_read_where_they_lie(isa: str, dtype: torch.dtype, block_size: int) -> None:
    """With whole tiles, tiles that end in the middle, and an odd number of tokens in the last one."""
    sizes = [(17, 128), (33, 95), (1, 257), (61, 640), (2, 127), (140, 13)]
    compare_with_the_reference(isa, dtype, (6, 2, 64), sizes, block_size=block_size)
    compare_with_the_reference(isa, dtype, (6, 2, 64), sizes, window=70, block_size=block_size)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("sizes", [[(17, 100)], [(2, 9)], [(17, 5000)], [(5, 3), (61, 2000), (1, 0)]])
def test_threads_divide_contexts_and_rows(threads: int, sizes: list[tuple[int, int]]) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        compare_with_the_reference("vec", torch.float32, (9, 3, 64), sizes)
        compare_with_the_reference("vec", torch.float32, (9, 3, 64), sizes, window=700)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_packing_without_a_name_is_read_number_by_number(dtype: torch.dtype) -> None:
    compare_with_the_reference("vec", dtype, (6, 2, 64), [(17, 100), (5, 1), (61, 257)], packing=cpu_cache.Packing.BY_OFFSET)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize(("isa", "dtype"), [("vec", torch.float32), pytest.param("amx", torch.bfloat16, marks=AMX)])
@pytest.mark.parametrize(
    ("window", "soft_cap", "has_sinks"),
    [
        (3, 0.0, False),  # shorter than paths are deep
        (50, 0.0, False),
        (1000, 0.0, False),  # a stretch of it that threads share, one that is shorter
        (0, 2.0, False),
        (0, 0.0, True),
        (50, 2.0, True),
    ],
)
def test_windows_go_by_depth_and_scores_are_capped_before_sinks_join(
    isa: str, dtype: torch.dtype, window: int, soft_cap: float, has_sinks: bool
) -> None:
    sizes = [(17, 100), (1, 33), (61, 257), (16, 1600), (9, 0), (12, 47)]
    compare_with_the_reference(isa, dtype, (6, 2, 64), sizes, window, soft_cap, has_sinks)


def compare_with_the_reference(
    isa: str,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    sizes: list[tuple[int, int]],
    window: int = 0,
    soft_cap: float = 0.0,
    has_sinks: bool = False,
    block_size: int = BLOCK,
    packing: cpu_cache.Packing | None = None,  # that of `isa`
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    # Blocks in random order, written by vLLM's own op; the trees' rows lie apart, in one packed projection as in a model.
    counts = [-(-(context + nodes) // block_size) for nodes, context in sizes]
    order = torch.randperm(sum(counts), generator=generator) + 1
    kv_cache = torch.full((sum(counts) + 1, num_kv_heads, block_size, 2 * head_dim), float("nan"), dtype=dtype)
    key_cache, value_cache = cpu_cache.split_block(kv_cache)
    tables, contexts, taken = torch.zeros(len(sizes), max(counts), dtype=torch.int32), [], 0
    for i, ((_, context), count) in enumerate(zip(sizes, counts, strict=True)):
        blocks = order[taken : taken + count]
        tables[i, :count] = blocks
        taken += count
        positions = torch.arange(context)
        key, value = random(context, num_kv_heads, head_dim), random(context, num_kv_heads, head_dim)
        slots = blocks[positions // block_size] * block_size + positions % block_size
        ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)
        contexts.append((key, value))
    nodes = torch.tensor([n for n, _ in sizes])
    first_rows = torch.tensor([3 + 2 * i for i in range(len(sizes))]) + nodes.cumsum(0) - nodes
    num_rows = int(first_rows[-1] + nodes[-1]) + 2
    projection = random(num_rows, num_heads + 2 * num_kv_heads, head_dim)
    query, key, value = projection.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    parents = [random_parents(n, generator) for n, _ in sizes]
    ancestors = torch.stack([ancestors_of(p, int(nodes.max())) for p in parents])

    layout = cpu_cache.probe_layout(isa, dtype, block_size, head_dim)
    if packing is not None:
        layout = replace(layout, packing=packing)
    output = torch.full((num_rows, num_heads, head_dim), 7.0, dtype=dtype)
    context_lens = torch.tensor([c for _, c in sizes])
    rows = TreeRows(tables, context_lens, first_rows, nodes, first_rows, nodes, ancestors)
    sinks = torch.randn(num_heads, generator=generator) if has_sinks else None
    cpu_kernel.tree_attention(
        query, key, value, kv_cache, layout, rows, head_dim**-0.5, output, soft_cap=soft_cap, window=window, sinks=sinks
    )

    untouched = torch.ones(num_rows, dtype=torch.bool)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for i, (n, _) in enumerate(sizes):
        own = slice(int(first_rows[i]), int(first_rows[i]) + n)
        untouched[own] = False
        depths = torch.from_numpy(node_depths(torch.tensor([parents[i]]).numpy()))[0]
        expected = reference.tree_attention(
            query[own], key[own], value[own], *contexts[i], ancestors[i, :n, :n], depths, head_dim**-0.5,
            window=window, soft_cap=soft_cap, sinks=sinks,
        )  # fmt: skip
        torch.testing.assert_close(output[own], expected, atol=tolerance, rtol=tolerance)
    assert (output[untouched] == 7.0).all()


@pytest.mark.usefixtures("operators")
def test_rows_and_keys_of_their_own() -> None:
    """A level of the drafter: two rows of each tree see keys of three earlier nodes and their own."""
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(4, 4, 32, generator=generator)
    key, value = (torch.randn(10, 2, 32, generator=generator) for _ in range(2))
    visible = torch.rand(2, 2, 5, generator=generator) < 0.6
    visible[..., 0] = True
    layout = cpu_cache.probe_layout("vec", torch.float32, BLOCK, 32)
    pairs, fives = torch.tensor([0, 2]), torch.tensor([0, 5])
    rows = TreeRows(
        torch.zeros(2, 1, dtype=torch.int32),
        torch.zeros(2, dtype=torch.long),
        pairs,
        torch.full((2,), 2),
        fives,
        torch.full((2,), 5),
        visible,
    )
    output = torch.zeros_like(query)
    cpu_kernel.tree_attention(query, key, value, torch.zeros(1, 2, BLOCK, 64), layout, rows, 0.2, output)
    for tree in range(2):
        scores = torch.einsum("rhd,khd->hrk", query[2 * tree :][:2], key[5 * tree :][:5].repeat_interleave(2, 1)) * 0.2
        weights = scores.masked_fill(~visible[tree], float("-inf")).softmax(-1)
        expected = torch.einsum("hrk,khd->rhd", weights, value[5 * tree :][:5].repeat_interleave(2, 1))
        torch.testing.assert_close(output[2 * tree :][:2], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("operators")
def test_a_wrong_mask_changes_the_result() -> None:
    """The comparison above would notice a node that sees its sibling."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(3, 2, 32, generator=generator) for _ in range(3))
    layout = cpu_cache.probe_layout("vec", torch.float32, BLOCK, 32)
    zero, three = torch.tensor([0]), torch.tensor([3])
    outputs = []
    for parents in ([0, 0, 0], [0, 0, 1]):
        table = torch.zeros(1, 1, dtype=torch.int32)
        rows = TreeRows(table, zero, zero, three, zero, three, ancestors_of(parents, 3)[None])
        output = torch.zeros(3, 2, 32)
        cpu_kernel.tree_attention(query, key, value, torch.zeros(1, 2, BLOCK, 64), layout, rows, 1.0, output)
        outputs.append(output)
    assert torch.equal(outputs[0][:2], outputs[1][:2])
    assert not torch.allclose(outputs[0][2], outputs[1][2], atol=1e-2)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize(
    ("isa", "dtype", "block_size", "head_dim"),
    [
        ("vec", torch.float32, 32, 64),
        ("vec", torch.bfloat16, 128, 128),
        ("vec16", torch.float32, 16, 80),
        pytest.param("amx", torch.bfloat16, 32, 64, marks=AMX),
        pytest.param("amx", torch.bfloat16, 128, 96, marks=AMX),
    ],
)
def test_tokens_are_read_and_moved_in_every_packing(isa: str, dtype: torch.dtype, block_size: int, head_dim: int) -> None:
    layout = cpu_cache.probe_layout(isa, dtype, block_size, head_dim)
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2 * block_size, 3, head_dim, generator=generator).to(dtype)
    value = torch.randn(2 * block_size, 3, head_dim, generator=generator).to(dtype)
    kv_cache = torch.zeros(4, 3, block_size, 2 * head_dim, dtype=dtype)
    blocks = torch.tensor([2, 1])
    slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()
    ops.cpu_attn_reshape_and_cache(key, value, *cpu_cache.split_block(kv_cache), slots, isa)
    for found, written in zip(cpu_cache.read_blocks(kv_cache, layout, blocks), (key, value), strict=True):
        assert torch.equal(found, written)
    # Each is overwritten by the next: all are read first, in every layer.
    sources, targets = slots[[5, block_size + 3, 1, 2]], slots[[7, 5, block_size + 3, 1]]
    layers = [kv_cache, kv_cache.clone()]
    cpu_cache.move_slots(layers, layout, sources, targets)
    moved = torch.arange(2 * block_size)
    moved[[7, 5, block_size + 3, 1]] = torch.tensor([5, block_size + 3, 1, 2])
    for layer in layers:
        for found, written in zip(cpu_cache.read_blocks(layer, layout, blocks), (key, value), strict=True):
            assert torch.equal(found, written[moved])
    assert layout.packing == (cpu_cache.Packing.BY_ROW if isa.startswith("vec") else cpu_cache.Packing.BY_PAIR)
