"""Time the ways to run tree rows on CPU: `python -m vllm_eagle.bench.speed.attention`.

For each context length, milliseconds of one core for 17 rows of one tree (root and 16 nodes) in one layer: our C++ operator, which
reads vLLM's packed blocks; plain torch, which stands in where that cannot be built; the masked kernel of vLLM's wheel, which needs
the context copied out of the blocks first; and vLLM's own causal kernel on as many rows, which no tree can use. Then JSON.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

BLOCK = 128
SHAPES = {"shipped target": (6, 2, 64), "8B-like": (32, 8, 128)}  # query heads, key heads, head dimension
CONTEXTS = (100, 1000, 4000)
NUM_ROWS = 17


def milliseconds(work: Callable[[], object], rounds: int = 15) -> float:
    """Median CPU time of this thread."""
    times = []
    for _ in range(rounds + 3):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return round(1000 * statistics.median(times[3:]), 3)


def measure(shape: tuple[int, int, int], context_len: int, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds by way."""
    from vllm import _custom_ops as ops

    from vllm_eagle import native
    from vllm_eagle.attention import cpu_cache, cpu_kernel
    from vllm_eagle.ops.rows import TreeRows

    if native.problem() is not None:
        raise ValueError(f"the C++ operators do not run here: {native.problem()}")
    heads, kv_heads, head_dim = shape
    seq_len, scale = context_len + NUM_ROWS, head_dim**-0.5
    num_blocks = -(-seq_len // BLOCK)
    kv_cache = torch.randn(num_blocks, kv_heads, BLOCK, 2 * head_dim).to(dtype)
    query = torch.randn(NUM_ROWS, heads, head_dim).to(dtype)
    key, value = (torch.randn(NUM_ROWS, kv_heads, head_dim).to(dtype) for _ in range(2))
    output = torch.empty_like(query)
    table = torch.randperm(num_blocks, dtype=torch.int32)[None]
    mask = torch.ones(1, NUM_ROWS, NUM_ROWS, dtype=torch.bool).tril()
    zero, count = torch.tensor([0]), torch.tensor([NUM_ROWS])
    rows = TreeRows(table, torch.tensor([context_len]), zero, count, zero, count, mask)
    layout = cpu_cache.probe_layout("vec", dtype, BLOCK, head_dim)

    def masked_kernel() -> None:
        context = cpu_cache.read_blocks(kv_cache, layout, table[0].long())
        places = torch.arange(seq_len, dtype=torch.int32)[None]
        torch.ops._C.extend_attention_cpu(
            query, key, value, output, *context, places, zero, torch.tensor([seq_len]), count.int(), zero.int(), NUM_ROWS, scale,
            0.0, False, -1, None, None, mask.flatten(),
        )  # fmt: skip

    starts, seq_lens = torch.tensor([0, NUM_ROWS], dtype=torch.int32), torch.tensor([seq_len], dtype=torch.int32)
    key_cache, value_cache = cpu_cache.split_block(kv_cache)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, seq_lens=seq_lens, dtype=dtype,
        query_start_loc=starts, causal=True, sliding_window_size=-1, isa="vec", enable_kv_split=True,
    )  # fmt: skip

    def causal() -> None:
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=key_cache, value_cache=value_cache, output=output, query_start_loc=starts, seq_lens=seq_lens,
            scale=scale, causal=True, alibi_slopes=None, sliding_window=-1, block_table=table, softcap=0,
            scheduler_metadata=schedule, s_aux=None,
        )  # fmt: skip

    arguments = (query, key, value, kv_cache, layout, rows, scale, output)
    return {
        "tree: C++ operator (used)": milliseconds(lambda: cpu_kernel.tree_attention(*arguments)),
        "tree: plain torch": milliseconds(lambda: cpu_kernel._by_torch(*arguments)),
        "tree: copy + vLLM's masked kernel": milliseconds(masked_kernel),
        "no tree: vLLM's causal kernel": milliseconds(causal),
    }


def main() -> None:
    """Print a table and JSON."""
    import vllm

    torch.set_num_threads(1)
    dtype = torch.bfloat16
    results: dict[str, Any] = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "dtype": str(dtype),
    }
    for name, shape in SHAPES.items():
        for context_len in CONTEXTS:
            case = f"{name}, context {context_len}"
            results[case] = measure(shape, context_len, dtype)
            print(case)
            for what, value in results[case].items():
                print(f"  {value:>9.3f} ms  {what}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
