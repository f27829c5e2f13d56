"""CUDA's attention backends without a GPU: our kernels through Triton's interpreter, vLLM's by plain torch.

So what is checked is which rows go where, and that the parts add up; not vLLM's own kernels. The interpreter is chosen when triton
is imported, hence a process of its own.
"""

import ast
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.attention.cuda_parts import LAYER, new_impl, runner_with
from tests.attention.interpreted import interpreted, run, starts_it
from vllm_eagle.algorithm.draft import Level
from vllm_eagle.algorithm.tree import DraftTree
from vllm_eagle.algorithm.verify import lay_out
from vllm_eagle.attention import interface
from vllm_eagle.ops.cases import Attention, attention_inputs
from vllm_eagle.ops.rows import TreeRows


@starts_it
def test_all_of_it() -> None:
    run(__file__)


SIZES = [(17, 100), (5, 1), (30, 257), (1, 33)]  # nodes and context; the last is a request without a tree


@pytest.fixture(params=["TRITON_ATTN", "FLASH_ATTN"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend's classes; vLLM's kernels below it are replaced."""
    from vllm.v1.attention.backends import flash_attn
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadataBuilder
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl, TritonAttentionMetadataBuilder
    from vllm.v1.attention.ops import merge_attn_states

    from vllm_eagle.attention import cuda, flash

    for builder in (FlashAttentionMetadataBuilder, TritonAttentionMetadataBuilder):
        monkeypatch.setattr(builder, "build", lambda self, prefix, common, fast_build=False: common)
    for impl in (FlashAttentionImpl, TritonAttentionImpl):
        monkeypatch.setattr(impl, "forward", plain_attention)
    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", flash_attention, raising=False)
    monkeypatch.setattr(merge_attn_states, "merge_attn_states", merged)
    found = {"TRITON_ATTN": cuda.TreeTritonAttentionBackend, "FLASH_ATTN": flash.TreeFlashAttentionBackend}
    return found[request.param]


def plain_attention(self, layer, query, key, value, kv_cache, metadata, output, *unused):  # type: ignore[no-untyped-def]
    """One row per request: its context and itself."""
    assert len(query) == metadata.num_reqs == metadata.num_actual_tokens
    for i, length in enumerate(metadata.seq_lens.tolist()):
        keys, values = gathered(kv_cache, metadata.block_table_tensor[i], length - 1)
        output[i] = dense(query[i : i + 1], torch.cat([keys, key[i : i + 1]]), torch.cat([values, value[i : i + 1]]), self.scale)[0]


def flash_attention(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Over the context alone, without a mask."""
    assert not given["causal"]
    assert given["return_softmax_lse"]
    starts, output = given["cu_seqlens_q"].tolist(), torch.empty_like(given["q"])
    log_sums = torch.empty(output.shape[1], len(output))
    assert int(given["cu_seqlens_q"].diff().max()) <= given["max_seqlen_q"]
    for i, length in enumerate(given["seqused_k"].tolist()):
        assert length <= given["max_seqlen_k"]
        own, table = slice(starts[i], starts[i + 1]), given["block_table"][i]
        position = torch.arange(length)
        keys, values = (x[table[position // x.shape[1]].long(), position % x.shape[1]] for x in (given["k"], given["v"]))
        output[own], log_sums[:, own] = dense(given["q"][own], keys, values, given["softmax_scale"])
    return output, log_sums


def merged(output: Any, prefix: Any, prefix_log_sums: Any, suffix: Any, suffix_log_sums: Any) -> None:
    assert suffix_log_sums.is_contiguous()
    total = torch.logaddexp(prefix_log_sums, suffix_log_sums)
    parts = ((prefix, prefix_log_sums), (suffix, suffix_log_sums))
    output.copy_(sum(part * (log_sums - total).exp().t()[..., None] for part, log_sums in parts))


def gathered(kv_cache: torch.Tensor, table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    position = torch.arange(length)
    size = kv_cache.shape[2]
    return kv_cache[table[position // size].long(), :, position % size].chunk(2, dim=-1)  # type: ignore[return-value]


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and log-sums [num_heads, rows]."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value), scores.logsumexp(-1)


@interpreted
@pytest.mark.parametrize("all_have_trees", [False, True])
def test_rows_of_trees_and_others_are_divided_and_put_together(
    backend: Any, all_have_trees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_eagle.ops import tree_attention

    query, key, value, kv_cache, rows = attention_inputs(Attention(SIZES), torch.device("cpu"), 3)
    # A batch as vLLM lays it out: requests one after the other, without the gaps of the case.
    order = torch.cat(
        [torch.arange(first, first + n) for first, n in zip(rows.first_rows.tolist(), rows.num_rows.tolist(), strict=True)]
    )
    query, key, value = (x[order].contiguous() for x in (query, key, value))
    num_nodes = torch.tensor([nodes for nodes, _ in SIZES])
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), num_nodes.cumsum(0).int()])
    rng = np.random.default_rng(1)
    parents = [np.array([0] + [int(rng.integers(0, i)) for i in range(1, n)]) for n, _ in SIZES]
    trees = [DraftTree(np.arange(len(p)), p, np.zeros(len(p), dtype=np.float32)) for p in parents]
    contexts = [context for _, context in SIZES]
    whole = lay_out(trees, range(len(SIZES)), starts[:-1].tolist(), contexts)
    first_rows, ancestors = starts[:-1].long(), torch.from_numpy(whole.ancestors)
    of_all = (rows.block_table, rows.context_lens, first_rows, num_nodes, first_rows, num_nodes, ancestors)
    num_trees = len(SIZES) - (not all_have_trees)
    metadata = SimpleNamespace(
        block_table=rows.block_table,
        seq_lens=torch.tensor(contexts) + num_nodes,
        max_seq_len=300,
        slot_mapping=torch.zeros(len(query), dtype=torch.long),
        causal=True,
        query_start_loc=starts,
        trees=None,
        plain=None,
        plain_rows=None,
        max_num_splits=0,
    )
    builder = backend.get_builder_cls().__new__(backend.get_builder_cls())
    builder.attach_prefix(metadata, TreeRows(*(x[:num_trees] for x in of_all)), starts, max(contexts))
    assert (metadata.plain is None) == all_have_trees

    found, expected = torch.full_like(query, 7.0), torch.empty_like(query)
    room = []
    workspace = tree_attention._workspace
    monkeypatch.setattr(tree_attention, "_workspace", lambda *args: [room.append(args[2]), workspace(*args)][1])
    new_impl(backend, query.shape[2]).forward(LAYER, query, key, value, kv_cache, metadata, found)
    tree_attention.reference(query, key, value, kv_cache, TreeRows(*of_all), query.shape[2] ** -0.5, expected)
    assert torch.allclose(found, expected, atol=2e-5, rtol=2e-5)
    if backend.get_name() == "FLASH_ATTN":  # whose parts have no rows for the prompts beside the trees
        assert room == [int(num_nodes[:num_trees].sum())]


@interpreted
def test_a_pass_without_trees_is_vllms(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    impl = new_impl(backend, 8)
    seen = []
    monkeypatch.setattr(backend.get_impl_cls().__mro__[3], "forward", lambda *args: seen.append(args) or "vLLM's")
    x = torch.zeros(1, 1, 8)
    assert impl.forward(LAYER, x, x, x, x, SimpleNamespace(trees=None), x) == "vLLM's"
    assert impl.forward(LAYER, x, x, x, x, None, x) == "vLLM's"
    assert len(seen) == 2


@interpreted
def test_levels_of_the_drafter(backend: Any) -> None:
    """Two levels of width 2 with padding behind: rows see their context and their ancestors, of all levels."""
    from vllm_eagle.attention.levels import DraftLevels

    query, key, value, kv_cache, rows = attention_inputs(Attention([(9, 50), (9, 20)]), torch.device("cpu"), 5)
    levels = DraftLevels(rows.block_table, rows.context_lens, 50)
    impl = new_impl(backend, query.shape[2])
    seen = torch.tensor([[[1, 0, 1, 0], [0, 1, 0, 1]], [[1, 0, 1, 0], [1, 0, 0, 1]]], dtype=torch.bool)
    for depth, visible in ((1, seen[:, :, :2].logical_and(torch.eye(2, dtype=torch.bool))), (2, seen)):
        here = slice(4 * (depth - 1), 4 * depth + 3)  # three rows of padding
        tokens = torch.zeros(2, 2, dtype=torch.long)
        levels.start(Level(depth=depth, token_ids=tokens, parent_rows=tokens, ancestors=visible))
        found = torch.zeros(7, *query.shape[1:])
        impl.forward(LAYER, query[here], key[here], value[here], kv_cache, levels, found)
        for i in range(4):
            request, row = divmod(i, 2)
            places = torch.tensor([4 * level + 2 * request + j for level in range(depth) for j in range(2)])
            chosen = places[visible[request, row]]
            keys, values = gathered(kv_cache, rows.block_table[request], int(rows.context_lens[request]))
            one = query[here][i : i + 1]
            expected, _ = dense(one, torch.cat([keys, key[chosen]]), torch.cat([values, value[chosen]]), impl.scale)
            assert torch.allclose(found[i], expected[0], atol=2e-5, rtol=2e-5)


@interpreted
def test_a_cache_in_fp8_is_read_back_as_plain_decoding_would(backend: Any) -> None:
    impl = new_impl(backend, 8)
    impl.kv_cache_dtype = "fp8"
    layer = SimpleNamespace(_k_scale_float=0.5, _v_scale_float=2.0)
    x = torch.tensor([0.1, 300.0, 500.0, -1e4]).reshape(1, 1, 4)
    key, value = impl.as_cached(layer, x, x)
    assert torch.equal(key, (x / 0.5).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.5)
    assert torch.equal(value, (x / 2).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 2)


@interpreted
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"attn_type": "encoder"}, "not causal self-attention"),
        ({"alibi_slopes": [1.0]}, "ALiBi"),
        ({"sinks": torch.ones(1)}, "TRITON_ATTN"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "use auto or fp8"),
        ({"sliding_window": (15, 0)}, "TRITON_ATTN"),
        ({"kv_cache_dtype": "fp8"}, "TRITON_ATTN"),
        ({"fa4_hd256": True}, "TRITON_ATTN"),
    ],
)
def test_what_a_layer_cannot_do_is_said(backend: Any, changes: dict[str, Any], reason: str) -> None:
    impl = new_impl(backend, 8)
    for name, x in changes.items():
        setattr(impl, name, x)
    reasons = "; ".join(impl.not_supported_reasons(100))
    if backend.get_name() == "TRITON_ATTN" and reason == "TRITON_ATTN":  # which can
        assert reasons == ""
    else:
        assert reason in reasons
        assert bool(reason) == bool(reasons)


@interpreted
def test_vllm_may_not_fuse_quantization_into_tree_attention(backend: Any) -> None:
    assert not new_impl(backend, 8).fused_output_quant_supported(None)


@interpreted
def test_every_backend_has_the_interface_of_attention(backend: Any) -> None:
    assert issubclass(backend.get_impl_cls(), interface.TreeAttention)
    assert backend.get_name() in interface.CUDA_BACKENDS


@interpreted
def test_kernels_are_compiled_before_requests_come(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every kind of layer, with few and many rows, in one part and in several."""
    from vllm_eagle.engine.v2 import warm_up
    from vllm_eagle.ops import tree_attention

    impls = [new_impl(backend, 64) for _ in range(3)]
    impls[2].sliding_window = (15, 0)
    runner = runner_with(impls, 16)
    monkeypatch.setattr(tree_attention, "_multiprocessors", lambda device: 132)
    launched = []
    launch = tree_attention._launch

    def spy(*args: Any) -> None:
        block_m, _ = tree_attention._blocks(args[0], args[4].visible.shape[1] * 4)
        launched.append((block_m, args[6][2], args[-1] > 1))
        launch(*args)

    monkeypatch.setattr(tree_attention, "_launch", spy)
    warm_up.attention(runner)
    assert set(launched) == {(rows, window, split) for rows in (16, 32, 64, 128) for window in (0, 16) for split in (False, True)}
    assert len(launched) == len(set(launched))  # layers of one kind are taken once
    assert not any(layer.kv_cache.any() for layer in runner.compilation_config.static_forward_context.values())


@interpreted
@pytest.mark.skipif(find_spec("xformers") is None, reason="needs xformers: pip install --no-deps -r vllm_eagle/locks/interop.lock")
def test_xformers_is_warmed_up_with_a_context_as_long_as_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.attention.xformers_by_torch import replace_kernels
    from vllm_eagle.attention.xformers import TreeXFormersBackend
    from vllm_eagle.engine.v2 import warm_up
    from vllm_eagle.ops import xformers_attention

    replace_kernels(monkeypatch)
    longest = []
    context_bias = xformers_attention._context_bias
    monkeypatch.setattr(
        xformers_attention, "_context_bias", lambda rows, most, *args: [longest.append(most), context_bias(rows, most, *args)][1]
    )
    warm_up.attention(runner_with([new_impl(TreeXFormersBackend, 64)], 64))
    assert set(longest) == {1, 1024}


@interpreted
def test_flash_attention_takes_what_we_give_it() -> None:
    """Its wrapper cannot be imported without its CUDA library, so its source is read."""
    import vllm

    from vllm_eagle.attention import flash

    source = Path(vllm.__file__).parent / "vllm_flash_attn" / "flash_attn_interface.py"
    functions = [node for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)]
    wrapper = next(node for node in functions if node.name == "flash_attn_varlen_func")
    calls = [node for node in ast.walk(ast.parse(Path(flash.__file__).read_text())) if isinstance(node, ast.Call)]
    ours = next(node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "flash_attn_varlen_func")
    assert {keyword.arg for keyword in ours.keywords} <= {arg.arg for arg in wrapper.args.args + wrapper.args.kwonlyargs}


@interpreted
def test_xformers_backend_has_the_interface_too() -> None:
    if find_spec("xformers") is None:
        pytest.skip("needs xformers")
    from vllm_eagle.attention.xformers import TreeXFormersBackend

    impl = new_impl(TreeXFormersBackend, 80)
    assert isinstance(impl, interface.TreeAttention)
    assert TreeXFormersBackend.get_name() in interface.CUDA_BACKENDS
    impl.kv_cache_dtype, impl.fa4_hd256 = "fp8", True
    reasons = impl.not_supported_reasons(100)
    assert any("heads of 80" in reason for reason in reasons)
    assert any("FlashAttention 4" in reason for reason in reasons)
    assert any("scales per token" in reason for reason in reasons)
    assert all(reason.endswith("TRITON_ATTN") for reason in reasons)
