"""Compile the GPU's kernels without one: Triton believes in a device that is not there, and launches nothing.

    python -m tests.ops.cuda_compile cubins      what representative cases compile for each compute capability
    python -m tests.ops.cuda_compile variants    what the warm-up compiles, and what steps compile after it

Prints one JSON line. A process of its own: the device is chosen once, and tests choose Triton's interpreter instead.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

os.environ["VLLM_EAGLE_NATIVE"] = "0"  # growth on CPU tensors shall go the GPU's way

import numpy as np
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.attention.cuda_parts import new_impl, runner_with
from vllm_eagle.algorithm import draft
from vllm_eagle.algorithm.tree import DraftTree
from vllm_eagle.algorithm.verify import lay_out
from vllm_eagle.engine.v2 import warm_up
from vllm_eagle.ops import cases, tree_attention
from vllm_eagle.ops.cases import Attention
from vllm_eagle.ops.rerank import rerank
from vllm_eagle.ops.rows import TreeRows
from vllm_eagle.ops.walk import walk

HEADS = (32, 8, 128)  # of an 8B Llama
VOCAB = 32_003
# As _shared_memory would tell: most bytes of a program.
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
LARGEST = Attention([(32, 64)], heads=HEADS, dtype=torch.bfloat16, token_major=True)
LARGEST_FP8 = Attention([(32, 64)], heads=HEADS, dtype=torch.bfloat16, fp8=True)
WIDE_FP8 = Attention([(16, 64)], heads=(16, 4, 256), dtype=torch.bfloat16, fp8=True)
SMALL = Attention([(4, 64)], num_splits=2)
WINDOW = Attention([(4, 64)], dtype=torch.float16, window=16, soft_cap=5.0)
SINKS = Attention([(8, 64)], heads=(64, 8, 64), dtype=torch.bfloat16, window=128, sinks=True)  # of gpt-oss-20b
SHAPES = {80: [LARGEST], 89: [LARGEST_FP8, WIDE_FP8], 90: [LARGEST, SMALL, WINDOW, SINKS], 120: [LARGEST_FP8]}
LATENT = Attention([(32, 64)], heads=(16, 576, 64), dtype=torch.bfloat16, num_splits=2)  # of DeepSeek-V2-Lite
OTHERS = {
    90: (
        "move_slots",
        "best_children rows=5 vocab=4096 topk=8 noise=True",
        "rerank drafted=8 nodes=1 requests=3",
        "walk requests=16",
    )
}


class Device:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int):
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # by whose number compiled kernels are kept

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def pretend(capability: int) -> None:
    driver.set_active(Device(capability))
    tree_attention._multiprocessors = lambda device: 132
    tree_attention._shared_memory = lambda device: SHARED_MEMORY[capability]


def cubins() -> dict[int, list[dict[str, Any]]]:
    """By capability: name, bytes of shared memory and of code of everything that its cases launch."""
    found: dict[int, list[dict[str, Any]]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        size = len(kernel.asm["cubin"])
        found[capability].append({"kernel": self.__name__, "shared_bytes": kernel.metadata.shared, "cubin_bytes": size})
        return kernel

    JITFunction.run = compile_only
    cpu = torch.device("cpu")
    for capability, shapes in SHAPES.items():
        pretend(capability)
        found[capability] = []
        for shape in shapes:
            cases.run_attention(shape, cpu, 0)
        for case in cases.all_cases():
            if case.name in OTHERS.get(capability, ()):
                case.run(cpu, 0)
        if capability in (89, 90):
            cases.run_latent(LATENT, cpu, 0)
    return found


def variants() -> dict[str, dict[str, list[str]]]:
    """By attention backend: kernels that the warm-up compiles, and those that steps compile after it, once per variant."""
    from vllm.v1.attention.backends import flash_attn
    from vllm.v1.attention.ops import merge_attn_states

    from vllm_eagle.attention.cuda import TreeTritonAttentionBackend
    from vllm_eagle.attention.flash import TreeFlashAttentionBackend

    pretend(90)
    flash_attn.flash_attn_varlen_func = lambda **given: (torch.empty_like(given["q"]), torch.empty(given["q"].shape[1::-1]))
    merge_attn_states.merge_attn_states = lambda *what: None
    found = {}
    for backend in (TreeTritonAttentionBackend, TreeFlashAttentionBackend):
        # One layer that sees all, and one with a window: FlashAttention's is as long as any context.
        impls = [new_impl(backend, HEADS[2]) for _ in range(2)]
        impls[1].sliding_window = (1023, 0)
        runner = runner_with(impls, 16, HEADS, torch.bfloat16)
        with recorded() as warm:
            warm_up.compaction(runner)
            warm_up.attention(runner)
            on_the_gpu_s_way(lambda runner=runner: warm_up.growth(runner, VOCAB))
        with recorded() as later:
            on_the_gpu_s_way(lambda backend=backend, runner=runner: steps(backend, runner))
        found[backend.get_name()] = {"warm_up": list(warm.values()), "later": [later[key] for key in later.keys() - warm.keys()]}
    return found


@contextmanager
def recorded() -> Iterator[dict[str, str]]:
    """Variants of kernels that are asked for, by key; none is compiled."""
    keys: dict[str, str] = {}

    def skip(*, key: str, fn: Any, **kwargs: Any) -> bool:
        keys[f"{fn.name} {key}"] = fn.name.rpartition(".")[2]
        return True

    knobs.runtime.jit_cache_hook = skip
    try:
        yield keys
    finally:
        knobs.runtime.jit_cache_hook = None


class OnGPU(torch.Tensor):
    """Says that it is on a GPU; what is computed from it says so, too."""

    is_cuda = True


def on_the_gpu_s_way(work: Callable[[], None]) -> None:
    """Growth asks its logits where they are."""
    grow = draft.grow_pool

    def grow_there(batch: Any, logits: torch.Tensor, run_head: Any, *rest: Any) -> Any:
        return grow(batch, logits.as_subclass(OnGPU), lambda level: run_head(level).as_subclass(OnGPU), *rest)

    draft.grow_pool = grow_there
    try:
        work()
    finally:
        draft.grow_pool = grow


def steps(backend: Any, runner: Any) -> None:
    """Batches of one and more requests, trees of several sizes, short and long contexts."""
    rng = np.random.default_rng(0)
    for num_reqs in (1, 2, 3, 16):
        table = torch.zeros(num_reqs, 256, dtype=torch.int32)
        for most_nodes in (3, 5, 9, 17):
            for context in (1, 300, 1000):
                sizes = [most_nodes, *rng.integers(3, most_nodes + 1, num_reqs - 1)]
                parents = [np.array([0, 0, 0] + [int(rng.integers(0, i)) for i in range(3, n)]) for n in sizes]
                trees = [DraftTree(np.arange(len(p)), p, np.zeros(len(p), dtype=np.float32)) for p in parents]
                first_rows = np.cumsum([0, *sizes[:-1]])
                batch = lay_out(trees, range(num_reqs), first_rows.tolist(), [context] * num_reqs)
                verify(backend, runner, batch, table)
                paths = torch.zeros(num_reqs, 8, dtype=torch.int32)
                paths[:, 0] = 2
                for _, moves in runner._moves:
                    moves(table, torch.full((num_reqs,), context), paths)
                draw(backend, runner, table, context, width=most_nodes // 2)
        for widths in ([8] * 8, [5, 3, 2, 1, 1, 1, 1, 1], [4, 2, 1, 1, 1, 1, 1, 1]):
            for noise in (None, torch.zeros(num_reqs, VOCAB)):
                grow(runner, num_reqs, widths, noise)


def verify(backend: Any, runner: Any, batch: Any, table: torch.Tensor) -> None:
    """Attention of a verification pass, its rows slices of one projection."""
    rows = int(batch.num_nodes.sum())
    starts = torch.nn.functional.pad(torch.from_numpy(batch.num_nodes).cumsum(0), (1, 0)).int()
    builder = backend.get_builder_cls().__new__(backend.get_builder_cls())
    metadata = SimpleNamespace(block_table=table, query_start_loc=starts, trees=None, plain=None, plain_rows=None, max_num_splits=0)
    first_rows, num_nodes = starts[:-1].long(), torch.from_numpy(batch.num_nodes)
    contexts, ancestors = torch.from_numpy(batch.context_lens), torch.from_numpy(batch.ancestors)
    rows_of_trees = TreeRows(table, contexts, first_rows, num_nodes, first_rows, num_nodes, ancestors)
    builder.attach_prefix(metadata, rows_of_trees, starts, int(contexts.max()))
    for layer in runner.compilation_config.static_forward_context.values():
        query, key, value = projected(rows)
        layer.impl.forward(layer, query, key, value, layer.kv_cache, metadata, torch.empty_like(query))


def draw(backend: Any, runner: Any, table: torch.Tensor, context: int, width: int) -> None:
    """Attention of the head's passes over three levels."""
    from vllm_eagle.attention.levels import DraftLevels

    num_reqs = len(table)
    for layer in runner.compilation_config.static_forward_context.values():
        levels = DraftLevels(table, torch.full((num_reqs,), context), context)
        for depth in (1, 2, 3):
            tokens = torch.zeros(num_reqs, width, dtype=torch.long)
            levels.start(draft.Level(depth, tokens, tokens, torch.ones(num_reqs, width, depth * width, dtype=torch.bool)))
            query, key, value = projected(num_reqs * width)
            layer.impl.forward(layer, query, key, value, layer.kv_cache, levels, torch.empty_like(query))


def projected(rows: int) -> tuple[torch.Tensor, ...]:
    num_heads, num_kv_heads, head_dim = HEADS
    projection = torch.zeros(rows, num_heads + 2 * num_kv_heads, head_dim, dtype=torch.bfloat16)
    return projection.split([num_heads, num_kv_heads, num_kv_heads], dim=1)


def grow(runner: Any, num_reqs: int, widths: list[int], noise: torch.Tensor | None) -> None:
    """The head's logits are cut out of padded rows, or filtered."""
    config = runner.tree_config
    for row in (32_064, VOCAB):

        def logits(width: int, row: int = row) -> torch.Tensor:
            return torch.zeros(num_reqs * width, row, dtype=torch.bfloat16)[:, :VOCAB].unflatten(0, (num_reqs, width))

        requests = [draft.Request(0, 16 - i, max_depth=8 - i % 3) for i in range(num_reqs)]
        batch = draft.Batch.of(requests, config, torch.device("cpu"))
        limits = draft.Limits(widths=widths, fixed_width=True)
        noise_at = None if noise is None else lambda depth: noise
        pool = draft.grow_pool(batch, logits(1)[:, 0], lambda level: logits(level.token_ids.shape[1]), config, noise_at, limits)
        roots = torch.zeros(num_reqs, dtype=torch.long)
        trees = rerank(roots, pool.tokens, pool.scores, pool.parents, pool.budgets, 1 + config.num_draft_tokens, config.depth_limit)
        walk(trees.token_ids, trees.parents, trees.num_nodes, trees.token_ids, config.depth_limit)


if __name__ == "__main__":
    print(json.dumps(cubins() if sys.argv[1] == "cubins" else variants()))
