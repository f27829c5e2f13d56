"""Attention of a whole verification pass captured in a CUDA graph, without a GPU: replays are right for any other trees.

Our kernels run through Triton's interpreter, hence in a process of their own; vLLM's are plain torch.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.attention.cuda_parts import LAYER, new_impl
from tests.attention.interpreted import interpreted, run, starts_it
from tests.engine.v2 import graphs

MOST_REQS, MOST_NODES, BLOCK, BLOCKS, HEADS, KV_HEADS, DIM = 4, 9, 16, 20, 4, 2, 16
BATCHES = [  # nodes and context of each request; the rest is padding
    [(9, 100)] * 4,
    [(1, 1), (9, 319 - 9), (4, 33)],
    [(3, 0)],
    [(9, 17), (1, 200), (1, 64), (2, 5)],
]


@starts_it
def test_all_of_it() -> None:
    run(__file__)


def flash_attention(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Over the context alone, without a mask, in shapes that do not depend on values."""
    query, table, starts = given["q"], given["block_table"].long(), given["cu_seqlens_q"].long()
    request = (torch.searchsorted(starts, torch.arange(len(query)), right=True) - 1).clamp(max=len(table) - 1)
    group = query.shape[1] // given["k"].shape[2]
    whole = (x[table].flatten(1, 2)[request].float() for x in (given["k"], given["v"]))
    key, value = (x[:, :, :, None].expand(-1, -1, -1, group, -1).flatten(2, 3) for x in whole)
    seen = torch.arange(key.shape[1]) < given["seqused_k"][request][:, None]
    assert given["max_seqlen_k"] >= key.shape[1]  # as long as any context may be
    scores = torch.einsum("qhd,qkhd->qhk", query, key) * given["softmax_scale"]
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    log_sums = scores.logsumexp(-1)
    weights = (scores - log_sums[..., None]).exp().nan_to_num(0.0)
    return torch.einsum("qhk,qkhd->qhd", weights, value).to(query.dtype), log_sums.t().contiguous()


def merged(output: Any, prefix: Any, prefix_log_sums: Any, suffix: Any, suffix_log_sums: Any) -> None:
    total = torch.logaddexp(prefix_log_sums, suffix_log_sums)
    parts = ((prefix, prefix_log_sums), (suffix, suffix_log_sums))
    output.copy_(sum(part * (log_sums - total).exp().t()[..., None] for part, log_sums in parts))


@interpreted
@pytest.mark.parametrize("multiprocessors", [1, 30])
@pytest.mark.parametrize("name", ["TRITON_ATTN", "FLASH_ATTN"])
def test_a_replay_is_right_for_other_trees(name: str, multiprocessors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor
    from vllm.v1.attention.backends import flash_attn
    from vllm.v1.attention.ops import merge_attn_states

    from vllm_eagle.attention import cuda, flash
    from vllm_eagle.engine.v2.slots import BatchTrees, SlotTrees
    from vllm_eagle.ops import tree_attention

    monkeypatch.setattr(tree_attention, "_multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", flash_attention, raising=False)
    monkeypatch.setattr(merge_attn_states, "merge_attn_states", merged)
    monkeypatch.setattr(GridExecutor, "__call__", graphs.launched(GridExecutor.__call__))
    backend = {"TRITON_ATTN": cuda.TreeTritonAttentionBackend, "FLASH_ATTN": flash.TreeFlashAttentionBackend}[name]
    impl, builder = new_impl(backend, DIM), backend.get_builder_cls().__new__(backend.get_builder_cls())

    cpu, torch_rng = torch.device("cpu"), torch.Generator().manual_seed(0)
    trees, batch_trees = SlotTrees(6, MOST_NODES, cpu), BatchTrees(MOST_REQS, MOST_NODES, cpu)
    kv_cache = torch.randn(MOST_REQS * BLOCKS, BLOCK, KV_HEADS, 2 * DIM, generator=torch_rng).transpose(1, 2)
    num_tokens = MOST_REQS * MOST_NODES
    query, output = (torch.randn(num_tokens, HEADS, DIM, generator=torch_rng) for _ in range(2))
    key, value = (torch.randn(num_tokens, KV_HEADS, DIM, generator=torch_rng) for _ in range(2))
    seq_lens, starts = torch.zeros(MOST_REQS, dtype=torch.int32), torch.arange(MOST_REQS + 1, dtype=torch.int32) * MOST_NODES
    table = torch.zeros(MOST_REQS, BLOCKS, dtype=torch.int32)

    batch_trees.fill(trees, torch.arange(MOST_REQS), starts, seq_lens)
    metadata = SimpleNamespace(block_table=table, query_start_loc=starts, plain=None, plain_rows=None, max_num_splits=0)
    builder.attach_prefix(metadata, batch_trees.rows(table, MOST_NODES), starts.clone(), BLOCKS * BLOCK)
    graph = graphs.Graph()
    with graphs.captured(graph):
        impl.forward(LAYER, query, key, value, kv_cache, metadata, output)

    for batch in BATCHES:
        slots = torch.randperm(6, generator=torch_rng)[: len(batch)]
        table.copy_(torch.randperm(MOST_REQS * BLOCKS, generator=torch_rng).view(MOST_REQS, BLOCKS))
        parents = torch.tensor(
            [[0] + [int(torch.randint(i, (), generator=torch_rng)) for i in range(1, MOST_NODES)] for _ in batch]
        )
        trees.ancestors[slots] = seen_by(parents)
        rows = torch.tensor([nodes for nodes, _ in batch] + [0] * (MOST_REQS - len(batch)), dtype=torch.int32)
        seq_lens.copy_(rows)
        seq_lens[: len(batch)] += torch.tensor([context for _, context in batch], dtype=torch.int32)
        starts[1:] = rows.cumsum(0)
        query.normal_(generator=torch_rng)
        output.fill_(7.0)
        batch_trees.fill(trees, slots, starts, seq_lens)
        graph.replay()

        expected = torch.empty_like(output)
        of_reference = batch_trees.rows(table, MOST_NODES)
        tree_attention.reference(query, key, value, kv_cache, of_reference, impl.scale, expected)
        num_rows = int(rows.sum())
        torch.testing.assert_close(output[:num_rows], expected[:num_rows], atol=2e-5, rtol=2e-5)
        if name == "TRITON_ATTN":
            assert (output[num_rows:] == 7.0).all()
    graphs.forget()


def seen_by(parents: torch.Tensor) -> torch.Tensor:
    """[num_trees, nodes] -> [num_trees, nodes, nodes] bool."""
    seen = torch.eye(parents.shape[1], dtype=torch.bool).repeat(len(parents), 1, 1)
    for tree, above in zip(seen, parents.tolist(), strict=True):
        for node in range(1, len(above)):
            tree[node] |= tree[above[node]]
    return seen
