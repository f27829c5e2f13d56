"""Time the ways to run tree rows on CPU: `python -m vllm_eagle.bench.attention`.

For each context length, milliseconds of one core for 17 rows of one tree (root and 16 nodes) in one layer: our path (copy out of
vLLM's packed blocks, then the masked kernel), its copy alone, the masked kernel alone as a token-major cache would allow, torch's
scaled_dot_product_attention on the copy, and vLLM's own causal kernel on as many rows, which no tree can use. Then prefill of 512
tokens and eight decode rows in vLLM's kernel and in the token-major kernels. The last line is JSON.
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


def main() -> None:
    """Print a table and JSON."""
    import vllm
    from vllm import _custom_ops as ops

    from vllm_eagle.attention import cpu_cache, cpu_kernel

    torch.set_num_threads(1)
    dtype = torch.bfloat16
    results: dict[str, Any] = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "dtype": str(dtype),
    }

    def stock(
        num_reqs: int, query_len: int, seq_len: int, shape: tuple[int, int, int], kv_cache: torch.Tensor
    ) -> Callable[[], None]:
        heads, kv_heads, head_dim = shape
        query = torch.randn(num_reqs * query_len, heads, head_dim).to(dtype)
        output = torch.empty_like(query)
        starts = torch.arange(num_reqs + 1, dtype=torch.int32) * query_len
        seq_lens = torch.full((num_reqs,), seq_len, dtype=torch.int32)
        blocks = -(-seq_len // BLOCK)
        table = torch.arange(num_reqs * blocks, dtype=torch.int32).view(num_reqs, blocks)
        key_cache, value_cache = cpu_cache.split_block(kv_cache)
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=num_reqs, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, seq_lens=seq_lens, dtype=dtype,
            query_start_loc=starts, causal=True, sliding_window_size=-1, isa="vec", enable_kv_split=True,
        )  # fmt: skip
        return lambda: ops.cpu_attention_with_kv_cache(
            query=query, key_cache=key_cache, value_cache=value_cache, output=output, query_start_loc=starts, seq_lens=seq_lens,
            scale=head_dim**-0.5, causal=True, alibi_slopes=None, sliding_window=-1, block_table=table, softcap=0,
            scheduler_metadata=schedule, s_aux=None,
        )  # fmt: skip

    for name, shape in SHAPES.items():
        heads, kv_heads, head_dim = shape
        layout = cpu_cache.probe_layout("vec", dtype, BLOCK, head_dim)
        for context_len in CONTEXTS:
            blocks = (context_len + NUM_ROWS) // BLOCK + 1
            kv_cache = torch.randn(blocks, kv_heads, BLOCK, 2 * head_dim).to(dtype)
            query = torch.randn(NUM_ROWS, heads, head_dim).to(dtype)
            key, value = (torch.randn(NUM_ROWS, kv_heads, head_dim).to(dtype) for _ in range(2))
            output = torch.empty_like(query)
            table = torch.randperm(blocks, dtype=torch.int32)[None]
            context = cpu_kernel.Context.of(table, torch.tensor([context_len]), BLOCK, NUM_ROWS)
            mask = torch.ones(1, NUM_ROWS, NUM_ROWS, dtype=torch.bool).tril()
            rows = cpu_kernel.TreeRows(torch.tensor([0]), torch.tensor([NUM_ROWS]), mask)
            arguments = (context, rows, head_dim**-0.5, output)

            def copy(kv_cache=kv_cache, layout=layout, context=context):
                return cpu_cache.read_blocks(kv_cache, layout, context.blocks)

            read = copy()
            results[f"{name}, context {context_len}"] = {
                "tree: copy + masked kernel (used)": milliseconds(
                    lambda q=query, k=key, v=value, c=copy, a=arguments: cpu_kernel.tree_attention(q, k, v, *c(), *a)
                ),
                "copy alone": milliseconds(copy),
                "tree: masked kernel, token-major cache": milliseconds(
                    lambda q=query, k=key, v=value, r=read, a=arguments: cpu_kernel.tree_attention(q, k, v, *r, *a)
                ),
                "tree: copy + scaled_dot_product_attention": milliseconds(
                    lambda q=query, k=key, v=value, c=copy, a=arguments: cpu_kernel._by_sdpa(q, k, v, *c(), *a)
                ),
                "no tree: vLLM's causal kernel": milliseconds(stock(1, NUM_ROWS, context_len + NUM_ROWS, shape, kv_cache)),
            }
        for label, num_reqs, query_len, seq_len in (("prefill of 512", 1, 512, 512), ("8 decode rows, context 1000", 8, 1, 1000)):
            slots = num_reqs * -(-seq_len // BLOCK) * BLOCK
            kv_cache = torch.randn(slots // BLOCK, kv_heads, BLOCK, 2 * head_dim).to(dtype)
            buffer = kv_cache.view(slots, 2, kv_heads, head_dim)
            query = torch.randn(num_reqs * query_len, heads, head_dim).to(dtype)
            key, value = (torch.randn(num_reqs * query_len, kv_heads, head_dim).to(dtype) for _ in range(2))
            output = torch.empty_like(query)
            places = torch.arange(slots, dtype=torch.int32).view(num_reqs, -1)
            lens = torch.full((num_reqs,), seq_len)
            if query_len > 1:

                def token_major(q=query, k=key, v=value, o=output, b=buffer, p=places, n=lens, length=query_len, d=head_dim):
                    torch.ops._C.extend_attention_cpu(
                        q, k, v, o, b[:, 0], b[:, 1], p, torch.arange(1), n, n.int(), torch.zeros(1, dtype=torch.int32), length,
                        d**-0.5, 0.0, False, -1, None, None, None,
                    )  # fmt: skip
            else:
                partial = torch.empty(num_reqs, heads, 8, head_dim + 1)

                def token_major(q=query, k=key, v=value, o=output, b=buffer, p=places, n=lens, w=partial, d=head_dim):
                    torch.ops._C.decode_attention_cpu(
                        q,
                        b[:, 0],
                        b[:, 1],
                        o,
                        k,
                        v,
                        p[:, -1].long(),
                        w,
                        p,
                        torch.arange(len(n)),
                        n,
                        d**-0.5,
                        0.0,
                        False,
                        -1,
                        None,
                        None,
                    )

            results[f"{name}, {label}"] = {
                "vLLM's kernel (used)": milliseconds(stock(num_reqs, query_len, seq_len, shape, kv_cache)),
                "token-major kernel": milliseconds(token_major),
            }
    for case, figures in results.items():
        if isinstance(figures, dict):
            print(case)
            for what, value in figures.items():
                print(f"  {value:>9.3f} ms  {what}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
