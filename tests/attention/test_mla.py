"""CUDA's attention over latents without a GPU: our kernel through Triton's interpreter, vLLM's own by plain torch.

What is checked is which rows go where: trees, roots alone, short ends of prompts, prompts. The interpreter is chosen when triton is
imported, hence a process of its own.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.attention.interpreted import interpreted, run, starts_it
from vllm_eagle.ops.rows import TreeRows

RANK, ROPE, HEADS, PAGE = 256, 64, 4, 16  # vLLM's metadata knows latents of 320, 512 and 576 numbers
LAYER = SimpleNamespace(_k_scale=torch.ones(1))
MOST = 9  # rows of the largest tree
# Rows and tokens before them of each request: two trees, then roots alone, short ends of prompts, and a whole prompt.
TREES = [(9, 40), (4, 3)]
ROOTS = [(1, 33), (1, 0)]
ENDS = [(3, 20), (5, 0)]
PROMPT = [(30, 0)]


@starts_it
def test_all_of_it() -> None:
    run(__file__)


class Batch:
    """Requests in vLLM's order, their latents in a cache whose blocks are anywhere."""

    def __init__(self, sizes: list[tuple[int, int]]):
        generator = torch.Generator().manual_seed(4)
        self.num_rows = torch.tensor([rows for rows, _ in sizes])
        self.context_lens = torch.tensor([context for _, context in sizes])
        self.starts = torch.nn.functional.pad(self.num_rows.cumsum(0), (1, 0)).int()
        self.table = torch.randperm(6 * len(sizes), generator=generator).int().view(len(sizes), 6)
        self.cache = torch.randn(6 * len(sizes), PAGE, RANK + ROPE, generator=generator)
        self.query = torch.randn(int(self.starts[-1]), HEADS, RANK + ROPE, generator=generator)
        places = [context + torch.arange(rows) for rows, context in sizes]
        slots = [self.table[i].long()[place // PAGE] * PAGE + place % PAGE for i, place in enumerate(places)]
        self.common = SimpleNamespace(
            num_reqs=len(sizes),
            num_actual_tokens=len(self.query),
            max_query_len=int(self.num_rows.max()),
            max_seq_len=int((self.num_rows + self.context_lens).max()),
            block_table_tensor=self.table,
            slot_mapping=torch.cat(slots),
            query_start_loc=self.starts,
            query_start_loc_cpu=self.starts,
            seq_lens=(self.num_rows + self.context_lens).int(),
            seq_lens_cpu_upper_bound=(self.num_rows + self.context_lens).int(),
            dcp_local_seq_lens=None,
            causal=True,
        )

    def trees(self, number: int) -> TreeRows:
        """Of the first requests: each node below a random one before it."""
        generator = torch.Generator().manual_seed(5)
        visible = torch.zeros(number, MOST, MOST, dtype=torch.bool)
        for tree in visible:
            tree[0, 0] = True
            for node in range(1, MOST):
                tree[node] = tree[int(torch.randint(node, (), generator=generator))]
                tree[node, node] = True
        first, rows = self.starts[:number].long(), self.num_rows[:number]
        return TreeRows(self.table[:number], self.context_lens[:number], first, rows, first, rows, visible)

    def expected(self, trees: TreeRows | None) -> torch.Tensor:
        """[num_tokens, num_heads, rank]: request by request, in float32."""
        found = torch.empty(len(self.query), HEADS, RANK)
        for i, (rows, context) in enumerate(zip(self.num_rows.tolist(), self.context_lens.tolist(), strict=True)):
            place = torch.arange(context + rows)
            keys = self.cache[self.table[i].long()[place // PAGE], place % PAGE]
            own = torch.ones(rows, rows, dtype=torch.bool).tril()
            if trees is not None and i < len(trees.context_lens):
                own = trees.visible[i, :rows, :rows]
            seen = torch.nn.functional.pad(own, (context, 0), value=True)
            asked = slice(int(self.starts[i]), int(self.starts[i + 1]))
            scores = torch.einsum("qhd,kd->hqk", self.query[asked], keys) * 0.1
            found[asked] = torch.einsum("hqk,kd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), keys[:, :RANK])
        return found


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ours, without an engine around it; how vLLM cuts contexts of prompts is not looked at."""
    from vllm.model_executor.layers.attention import mla_attention

    from vllm_eagle.attention.mla import TreeMLAMetadata, TreeMLAMetadataBuilder

    monkeypatch.setattr(mla_attention, "build_mla_chunked_context_metadata", lambda **given: None)
    found: Any = TreeMLAMetadataBuilder.__new__(TreeMLAMetadataBuilder)
    found.device, found.metadata_cls, found.reorder_batch_threshold = torch.device("cpu"), TreeMLAMetadata, MOST
    found.use_pcp, found.dcp_world_size, found.dcp_manager, found.page_size = False, 1, None, PAGE
    found.chunked_prefill_workspace, found.chunked_prefill_workspace_size = None, 0
    found.dcp_local_block_size = found.dcp_virtual_block_size = 1
    found.q_data_type = torch.float32
    found.model_config = SimpleNamespace(get_head_size=lambda: RANK + ROPE, dtype=torch.float32)
    found._prefill_backend = SimpleNamespace(prepare_metadata=lambda metadata: None)
    return found


@pytest.fixture
def impl() -> Any:
    from vllm_eagle.attention.mla import TreeMLAImpl

    found: Any = TreeMLAImpl.__new__(TreeMLAImpl)
    found.kv_lora_rank, found.scale, found.kv_cache_dtype = RANK, 0.1, "auto"
    return found


@interpreted
@pytest.mark.parametrize(
    ("sizes", "num_trees", "of_vllm"),
    [
        ([*TREES, *ROOTS, *PROMPT], 2, [1, 1]),
        ([*TREES, *ROOTS, *ENDS, *PROMPT], 2, []),
        (TREES, 2, []),
        ([*ROOTS, *ENDS, *PROMPT], 0, []),
        ([*ROOTS, *PROMPT], 0, [1, 1]),
    ],
    ids=["roots", "ends of prompts", "trees alone", "no trees", "decoding"],
)
def test_rows_go_where_they_belong(
    sizes: list[tuple[int, int]], num_trees: int, of_vllm: list[int], builder: Any, impl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.attention.backends.mla.triton_mla import TritonMLAImpl

    batch = Batch(sizes)
    metadata, trees = builder.build(0, batch.common), None
    num_decoded = len([rows for rows, _ in sizes if rows <= MOST])
    assert (metadata.num_decodes, metadata.num_prefills) == (num_decoded, len(sizes) - num_decoded)
    if num_trees:
        trees = batch.trees(num_trees)
        builder.attach_prefix(metadata, trees, batch.starts, int(batch.context_lens[:num_trees].max()))
    seen: list[int] = []

    def of_vllm_itself(self: Any, query: Any, cache: torch.Tensor, metadata: Any, layer: Any) -> tuple[torch.Tensor, None]:
        """One row of each request that sees all of it."""
        query = query if isinstance(query, torch.Tensor) else torch.cat(query, -1)
        lengths, table = metadata.decode.seq_lens.tolist(), metadata.decode.block_table
        assert len(query) == len(lengths) == len(table) == metadata.num_decodes == metadata.num_decode_tokens
        seen.extend([1] * len(query))
        rows = []
        for row, length, blocks in zip(query, lengths, table.long(), strict=True):
            keys = cache[blocks[torch.arange(length) // PAGE], torch.arange(length) % PAGE]
            rows.append((row @ keys.T * 0.1).softmax(-1) @ keys[:, :RANK])
        return torch.stack(rows), None

    monkeypatch.setattr(TritonMLAImpl, "forward_mqa", of_vllm_itself)
    decoded = batch.query[: metadata.num_decode_tokens]
    found, _ = impl.forward_mqa(decoded.split([RANK, ROPE], dim=-1), batch.cache, metadata, LAYER)
    assert torch.allclose(found, batch.expected(trees)[: len(decoded)], atol=2e-5, rtol=2e-5)
    assert seen == of_vllm
    if num_trees:
        causal = batch.expected(None)[: len(decoded)]
        assert not torch.allclose(found, causal, atol=1e-2)


@interpreted
def test_rows_of_padding_are_zero(builder: Any, impl: Any) -> None:
    """In a captured pass: a request without rows, and rows of no request."""
    batch = Batch(TREES)
    batch.starts[2] = batch.starts[1]
    batch.common.seq_lens[1] = 0
    metadata = builder.build(0, batch.common)
    trees = batch.trees(2)
    trees.num_rows[1] = 0
    builder.attach_prefix(metadata, trees, batch.starts, 64)
    found, _ = impl.forward_mqa(batch.query, batch.cache, metadata, LAYER)
    assert torch.allclose(found[:9], batch.expected(trees)[:9], atol=2e-5, rtol=2e-5)
    assert not found[9:].any()


@interpreted
def test_warm_up_launches_what_steps_launch(impl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's cache has no heads."""
    from vllm_eagle.engine.v2 import warm_up
    from vllm_eagle.ops import latent_tree_attention

    seen = []
    monkeypatch.setattr(latent_tree_attention, "latent_tree_attention", lambda *args: seen.append(args))
    layer = SimpleNamespace(
        num_heads=HEADS, num_kv_heads=1, head_size=RANK + ROPE, kv_cache=torch.zeros(2, PAGE, RANK + ROPE), impl=impl
    )
    runner = SimpleNamespace(
        device=torch.device("cpu"),
        dtype=torch.float32,
        max_model_len=1024,
        compilation_config=SimpleNamespace(static_forward_context={"layer": layer, "another": layer}),
        kv_cache_config=SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=["layer", "another"])]),
    )
    warm_up.attention(runner)
    assert {longest for *_, longest in seen} == {1, 1024}
    for query, latent, cache, rows, scale, output, _ in seen:
        assert (scale, cache.shape) == (0.1, (2, PAGE, RANK + ROPE))
        assert rows.block_table.shape == (1, 1024 // PAGE)
        assert latent.shape == (len(query), RANK + ROPE)
        assert output.shape == (len(query), HEADS, RANK)


@interpreted
def test_compaction_takes_latents_for_a_single_head() -> None:
    from vllm_eagle.engine.v2.runner import _with_heads
    from vllm_eagle.ops.move_slots import Caches, move_accepted

    caches = [torch.randn(8, PAGE, RANK + ROPE) for _ in range(2)]
    before = [cache.clone() for cache in caches]
    table, context_lens, paths = torch.tensor([[5, 2]], dtype=torch.int32), torch.tensor([14]), torch.tensor([[2, 5, 0]]).int()
    move_accepted(Caches.of([_with_heads(cache) for cache in caches]), table, context_lens, paths)
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache[5, 15], old[2, 0])  # node 2 to the place behind the root
        assert torch.equal(cache[2, 0], old[2, 3])  # node 5 to the next
        assert torch.equal(cache[2, 1:], old[2, 1:])
    whole = torch.zeros(2, 1, PAGE, 8)
    assert _with_heads(whole) is whole


@interpreted
def test_quantized_caches_are_refused(impl: Any) -> None:
    assert impl.not_supported_reasons(64) == []
    impl.kv_cache_dtype = "fp8"
    assert impl.not_supported_reasons(64) == ["kv_cache_dtype=fp8 is not read by the tree kernel over latents; use auto"]
