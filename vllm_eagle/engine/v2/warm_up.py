"""Launch our kernels in the variants that steps will want, so that no request waits for their compilation.

xformers picks variants of its own by the sizes of a batch; not all of them are met here.
"""

from collections.abc import Iterator
from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import DEFAULT_VOCAB_PADDING_SIZE
from vllm.utils.math_utils import cdiv, round_up

from vllm_eagle.algorithm import draft
from vllm_eagle.attention.tree_impl import TreePass
from vllm_eagle.ops.rerank import rerank
from vllm_eagle.ops.rows import TreeRows
from vllm_eagle.ops.walk import walk


def warm_up(runner: Any) -> None:
    """All of them; `runner` is an EagleTreeRunner with caches."""
    from vllm_eagle.engine.v2.noise import coming_noise
    from vllm_eagle.engine.v2.split import DraftSplit

    slots = torch.zeros(1, dtype=torch.int64, device=runner.device)
    token_ids = runner.speculator.logits.token_ids
    states, vocab_size = runner.states, runner.model_config.get_vocab_size()
    coming_noise(
        states.seeds.gpu, states.temperature.gpu, slots, slots, token_ids, vocab_size, runner.speculator.use_fp64_gumbel
    )  # fmt: skip
    growth(runner, vocab_size if token_ids is None else len(token_ids))
    compaction(runner)
    attention(runner)
    if isinstance(runner.adaptive_verification, DraftSplit):
        runner.adaptive_verification.warm_up()


def growth(runner: Any, vocab_size: int) -> None:
    """From logits to trees, and the walk down them."""
    config = runner.tree_config
    batch = draft.Batch.of([draft.Request(0, config.num_draft_tokens)], config, runner.device)
    for logits in _as_the_head_gives_them(runner, vocab_size):
        for noise in (None, logits.float()):
            pool = draft.grow_pool(
                batch,
                logits[:, 0],
                lambda level, logits=logits: logits[:, : level.token_ids.shape[1]],  # type: ignore[misc]
                config,
                None if noise is None else lambda depth, noise=noise: noise[:, 0],  # type: ignore[misc]
                draft.Limits(fixed_width=True),
            )
            roots = torch.zeros(1, dtype=torch.int64, device=runner.device)
            most_nodes = config.num_draft_tokens + 1
            trees = rerank(roots, pool.tokens, pool.scores, pool.parents, pool.budgets, most_nodes, config.depth_limit)
            walk(trees.token_ids, trees.parents, trees.num_nodes, trees.token_ids, config.depth_limit)


def _as_the_head_gives_them(runner: Any, vocab_size: int) -> Iterator[torch.Tensor]:
    """Zeros [1, most nodes of a level, vocab]: in one piece, as after filters, and cut out of padded rows, as by vLLM."""
    width = runner.tree_config.level_width
    for row in sorted({vocab_size, round_up(vocab_size, DEFAULT_VOCAB_PADDING_SIZE)}):
        yield torch.zeros(1, width, row, dtype=runner.dtype, device=runner.device)[:, :, :vocab_size]


def compaction(runner: Any) -> None:
    """Nothing is moved."""
    one = torch.ones(1, dtype=torch.int64, device=runner.device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=runner.device)  # vLLM's null block
    for _, moves in runner._moves:
        moves(table, one, table)


def attention(runner: Any) -> None:
    """Of each kind of layer, with few and many rows, in one part and in several."""
    for layer in _distinct_layers(runner):
        one = torch.ones(1, dtype=torch.int64, device=runner.device)
        num_blocks = cdiv(runner.max_model_len, layer.kv_cache.shape[-2])
        table = torch.zeros(1, num_blocks, dtype=torch.int32, device=runner.device)  # vLLM's null block
        for num_rows in sorted({max(1, stacked * layer.num_kv_heads // layer.num_heads) for stacked in (16, 32, 64, 128)}):
            visible = torch.ones(1, num_rows, num_rows, dtype=torch.bool, device=runner.device).tril()
            rows = TreeRows(table, one, one - 1, one * num_rows, one - 1, one * num_rows, visible)
            query = torch.zeros(num_rows, layer.num_heads, layer.head_size, dtype=runner.dtype, device=runner.device)
            own = query[:, : layer.num_kv_heads]
            for longest in (1, runner.max_model_len):
                layer.impl.attend(TreePass(layer, query, own, own, layer.kv_cache, rows, longest, torch.empty_like(query)))


def _distinct_layers(runner: Any) -> Iterator[Any]:
    """One layer of each kind that kernels are compiled for."""
    seen = set()
    for group in runner.kv_cache_config.kv_cache_groups:
        for layer in (runner.compilation_config.static_forward_context[name] for name in group.layer_names):
            impl, cache = layer.impl, layer.kv_cache
            shape = (layer.num_heads, layer.num_kv_heads, layer.head_size, cache.dtype, cache.shape[-2], cache.stride())
            options = (getattr(impl, name, None) for name in ("sliding_window", "logits_soft_cap"))  # latents have none
            kind = (*shape, *options, getattr(impl, "sinks", None) is None)
            if kind not in seen:
                seen.add(kind)
                yield layer
