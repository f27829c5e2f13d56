"""Time the ways to run tree rows on CPU: `python -m vllm_eagle.bench.speed.attention`.

Milliseconds of one core for the rows of one tree in one layer, by model shape, context and number of rows (root and 16 or 60
nodes): our C++ operator, which reads vLLM's packed blocks; plain torch, which stands in where that cannot be built; the masked
kernel of vLLM's wheel, which needs the context copied out of the blocks first; and vLLM's own causal kernel on as many rows, which
no tree can use. Beside them what the same core needs to read the keys and values once, as fast as it adds up a
long tensor, and for the products alone, as fast as torch multiplies large matrices. `--layer` times what a layer costs beside the
operator: our implementation of vLLM's attention, and vLLM's, called as the model calls it. Then JSON.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

BLOCK = 128
# query heads, key heads, head dimension
SHAPES = {"shipped target": (6, 2, 64), "SmolLM2-135M": (9, 3, 64), "8B-like": (32, 8, 128)}
CONTEXTS = (100, 1000, 4000, 8000)
ROWS = (17, 61)
OURS, CAUSAL, BY_TORCH = "tree: C++ operator (used)", "no tree: vLLM's causal kernel", "tree: plain torch"
MASKED = "tree: copy + vLLM's masked kernel"
READING, PRODUCTS = "keys and values read once", "products, as fast as torch multiplies"


def taking_turns(ways: dict[str, Callable[[], object]], seconds: float = 1.0, fewest: int = 9) -> dict[str, float]:
    """Median milliseconds of this thread by way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for work in ways.values():
        work()
    end = time.monotonic() + seconds
    while time.monotonic() < end or min(map(len, times.values())) < fewest:
        for name, work in ways.items():
            start = time.thread_time()
            work()
            times[name].append(1000 * (time.thread_time() - start))
    return {name: round(statistics.median(found), 4) for name, found in times.items()}


class Case:
    """One tree behind a context, in vLLM's packed cache, and vLLM's metadata for as many rows of a chain."""

    def __init__(self, shape: tuple[int, int, int], context_len: int, num_rows: int, dtype: torch.dtype) -> None:
        from vllm import _custom_ops as ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        from vllm_eagle.attention import cpu_cache
        from vllm_eagle.attention.cpu import TreeCPUAttentionMetadata
        from vllm_eagle.ops.rows import TreeRows

        heads, kv_heads, head_dim = shape
        self.shape, self.num_rows, self.seq_len = shape, num_rows, context_len + num_rows
        self.scale, self.isa = head_dim**-0.5, _get_attn_isa(dtype, BLOCK, head_dim)
        num_blocks = -(-self.seq_len // BLOCK)
        self.kv_cache = torch.zeros(num_blocks, kv_heads, BLOCK, 2 * head_dim, dtype=dtype)
        self.table = torch.randperm(num_blocks, dtype=torch.int32)[None]
        keys, values = (torch.randn(self.seq_len, kv_heads, head_dim).to(dtype) for _ in range(2))
        positions = torch.arange(self.seq_len)
        slots = self.table[0].long()[positions // BLOCK] * BLOCK + positions % BLOCK
        self.split = cpu_cache.split_block(self.kv_cache)
        ops.cpu_attn_reshape_and_cache(keys, values, *self.split, slots, self.isa)
        self.query = torch.randn(num_rows, heads, head_dim).to(dtype)
        self.key, self.value = keys[context_len:].clone(), values[context_len:].clone()
        self.output = torch.empty_like(self.query)
        mask = torch.ones(1, num_rows, num_rows, dtype=torch.bool).tril()
        zero, count = torch.tensor([0]), torch.tensor([num_rows])
        self.rows = TreeRows(self.table, torch.tensor([context_len]), zero, count, zero, count, mask)
        self.layout = cpu_cache.probe_layout(self.isa, dtype, BLOCK, head_dim)
        starts, seq_lens = torch.tensor([0, num_rows], dtype=torch.int32), torch.tensor([self.seq_len], dtype=torch.int32)
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, seq_lens=seq_lens, dtype=dtype,
            query_start_loc=starts, causal=True, sliding_window_size=-1, isa=self.isa, enable_kv_split=True,
        )  # fmt: skip
        self.metadata = TreeCPUAttentionMetadata(
            num_actual_tokens=num_rows, max_query_len=num_rows, query_start_loc=starts, max_seq_len=self.seq_len, seq_lens=seq_lens,
            block_table=self.table, slot_mapping=slots[context_len:], scheduler_metadata=schedule,
        )  # fmt: skip

    def causal(self) -> None:
        """vLLM's kernel."""
        from vllm import _custom_ops as ops

        key_cache, value_cache = self.split
        ops.cpu_attention_with_kv_cache(
            query=self.query, key_cache=key_cache, value_cache=value_cache, output=self.output,
            query_start_loc=self.metadata.query_start_loc, seq_lens=self.metadata.seq_lens, scale=self.scale, causal=True,
            alibi_slopes=None, sliding_window=-1, block_table=self.table, softcap=0,
            scheduler_metadata=self.metadata.scheduler_metadata, s_aux=None,
        )  # fmt: skip

    def masked(self) -> None:
        """vLLM's kernel with a mask."""
        from vllm_eagle.attention import cpu_cache

        context = cpu_cache.read_blocks(self.kv_cache, self.layout, self.table[0].long())
        places = torch.arange(self.seq_len, dtype=torch.int32)[None]
        zero = torch.tensor([0])
        torch.ops._C.extend_attention_cpu(
            self.query, self.key, self.value, self.output, *context, places, zero, torch.tensor([self.seq_len]),
            self.rows.num_rows.int(), zero.int(), self.num_rows, self.scale, 0.0, False, -1, None, None,
            self.rows.visible.flatten(),
        )  # fmt: skip

    def ways(self) -> dict[str, Callable[[], object]]:
        """All ways to attend."""
        from vllm_eagle.attention import cpu_kernel

        arguments = (self.query, self.key, self.value, self.kv_cache, self.layout, self.rows, self.scale, self.output)
        ways: dict[str, Callable[[], object]] = {
            OURS: lambda: cpu_kernel.tree_attention(*arguments),
            CAUSAL: self.causal,
            BY_TORCH: lambda: cpu_kernel._by_torch(*arguments, soft_cap=0.0, window=0, sinks=None),
        }
        if self.query.dtype != torch.float32:  # which it does not know
            ways[MASKED] = self.masked
        return ways

    def times(self) -> dict[str, float]:
        """The two that are compared take turns with each other alone: the others leave nothing in the CPU's caches."""
        ways = self.ways()
        compared = {name: ways.pop(name) for name in (OURS, CAUSAL)}
        return taking_turns(compared) | taking_turns(ways, 0.5, 5)

    def bounds(self, bytes_per_ms: float, products_per_ms: float) -> dict[str, float]:
        """What reading and multiplying alone would take."""
        heads, kv_heads, head_dim = self.shape
        read = 2 * self.seq_len * kv_heads * head_dim * self.kv_cache.element_size()
        products = 2 * self.num_rows * self.seq_len * heads * head_dim
        return {
            READING: round(read / bytes_per_ms, 4),
            PRODUCTS: round(products / products_per_ms, 4),
        }

    def layers(self) -> dict[str, float]:
        """A layer's whole call, ours with a tree and vLLM's without."""
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

        from vllm_eagle.attention.cpu import TreeCPUAttentionImpl

        heads, kv_heads, head_dim = self.shape
        impl = object.__new__(TreeCPUAttentionImpl)  # without an engine there is nothing to make one from
        impl.num_heads, impl.num_kv_heads, impl.head_size, impl.scale = heads, kv_heads, head_dim, self.scale
        impl.logits_soft_cap, impl.sliding_window, impl.alibi_slopes, impl.sinks = 0, -1, None, None
        impl.kv_cache_dtype, impl.attn_type, impl.use_zentorch_sdpa = "auto", "decoder", False
        layer = SimpleNamespace(isa=self.isa, layer_name="layer", _k_scale_float=1.0, _v_scale_float=1.0)
        trees = copy.copy(self.metadata)
        trees.trees = self.rows
        tensors = (self.query, self.key, self.value, self.kv_cache)
        return taking_turns(
            {
                OURS: self.ways()[OURS],
                CAUSAL: self.causal,
                "a layer with a tree": lambda: impl.forward(layer, *tensors, trees, self.output),
                "a layer of plain vLLM": lambda: CPUAttentionBackendImpl.forward(impl, layer, *tensors, self.metadata, self.output),
            }
        )


def rates(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes that a core reads and products that it adds up in a millisecond."""
    numbers, matrix = torch.ones(2**26), torch.ones(1536, 1536, dtype=dtype)
    fastest = []
    for work in (numbers.sum, lambda: matrix @ matrix):
        times = []
        for _ in range(6):
            start = time.thread_time()
            work()
            times.append(1000 * (time.thread_time() - start))
        fastest.append(min(times))
    return 4 * len(numbers) / fastest[0], len(matrix) ** 3 / fastest[1]


def table(results: dict[str, Any]) -> str:
    """In Markdown."""
    ours = ("shape, context, rows", "C++ operator", "vLLM's causal kernel", "of it")
    heads = (*ours, "copy + masked kernel", "plain torch", "reading", "products")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for case, found in results.items():
        if isinstance(found, dict):
            figures = [f"{found[OURS]:.3f}", f"{found[CAUSAL]:.3f}", f"{found[OURS] / found[CAUSAL]:.2f}"]
            figures += [f"{found[way]:.2f}" if way in found else "-" for way in (MASKED, BY_TORCH)] + [
                f"{found[way]:.3f}" for way in (READING, PRODUCTS)
            ]
            lines.append("| " + " | ".join([case.replace("context ", "").replace(" rows", ""), *figures]) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--layer", action="store_true", help="what a layer costs beside the operator, at a context of 100")
    options = parser.parse_args(arguments)
    import vllm

    from vllm_eagle import native

    if native.problem() is not None:
        parser.error(f"the C++ operators do not run here: {native.problem()}")
    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype)
    speeds = rates(dtype)
    results: dict[str, Any] = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "dtype": str(dtype),
        "read, GB/s": round(speeds[0] / 1e6, 1),
        "products, 10^9/s": round(speeds[1] / 1e6, 1),
    }
    for name, shape in SHAPES.items():
        for context_len in CONTEXTS[:1] if options.layer else CONTEXTS:
            for num_rows in ROWS:
                case = Case(shape, context_len, num_rows, dtype)
                found = case.layers() if options.layer else case.times() | case.bounds(*speeds)
                results[f"{name}, context {context_len}, {num_rows} rows"] = found
                print(f"{name}, context {context_len}, {num_rows} rows")
                for what, value in found.items():
                    print(f"  {value:>9.4f} ms  {what}")
    if not options.layer:
        print(table(results))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
