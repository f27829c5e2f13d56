"""The model runner with draft trees on CUDA: vLLM's V1 runner. Not run on a GPU yet.

The target and the head run as CUDA graphs between attention layers (`PIECEWISE`); attention runs eagerly, since its metadata holds
the trees. What a step sends to the GPU goes from pinned memory without waiting, but for what is named here. In a step with trees of
depth d the host waits for the GPU

- once for the sampled tokens if all nodes are sampled after at once (scorer.py: temperature, top-k and top-p alone), else once per
  depth of the longest walk, since only then is the next node known; three times more for logprobs;
- once to read the finished trees, which the scheduler needs: levels are drafted in widths and to a depth that are known before them
  (draft.py), so nothing is asked in between;
- twice per level if a grammar constrains a request that drafts.

So twice in general, and up to d times more where a request has penalties, logprobs or a grammar; tests/algorithm/test_draft.py
holds that growth reads nothing, the rest was read, not run. Besides, every sampled request costs a launch per level for its coming
noise (noise_rows.py) and one per node and depth when it is used (node_noise.py), as it costs vLLM one per sampled token.

The engine for vLLM's V2 runner, which waits for nothing, is being built in engine/v2/ and will take this one's place.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.vocab_parallel_embedding import DEFAULT_VOCAB_PADDING_SIZE
from vllm.utils.math_utils import cdiv, round_up
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_eagle.algorithm import draft
from vllm_eagle.algorithm.verify import TreeBatch
from vllm_eagle.attention.tree_impl import TreePass
from vllm_eagle.engine.v1.proposer import BACKLOG_BYTES
from vllm_eagle.engine.v1.runner import EagleTreeRunner
from vllm_eagle.ops.rows import TreeRows

# What a level holds per logit at the most: logits in 16 bits, and filtering them two copies in 32.
_BYTES_PER_DRAFT_LOGIT = 10


class EagleTreeGPUModelRunner(EagleTreeRunner, GPUModelRunner):
    """vLLM's V1 GPU model runner, verifying trees. Not run on a GPU yet."""

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, is_profiling: bool = False, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; then prepare compaction.

        Raises:
            ValueError: the caches' layout is none that it knows.
        """
        super().initialize_kv_cache(kv_cache_config, is_profiling, *args, **kwargs)
        if is_profiling:  # this cache is dropped again
            return
        from vllm_eagle.ops.move_slots import Caches  # Triton: not installed beside vLLM's CPU wheel

        for gid, group in enumerate(self.kv_cache_config.kv_cache_groups):
            planned = self.input_batch.block_table[gid].block_size
            sizes = {self._layer(name).kv_cache.shape[2] for name in group.layer_names} - {planned}
            if sizes:
                raise ValueError(
                    f"attention takes blocks of {sizes} tokens where block_size is {planned}: give --block-size so much"
                )
        self._caches = [(gid, Caches.of([layer.kv_cache for layer in layers])) for gid, layers in self._target_layers()]

    def warm_up_kernels(self) -> None:
        """Launch our kernels in the variants that steps will want, so that no request waits for their compilation.

        xformers picks variants of its own by the sizes of a batch; not all of them are met here.
        """
        from vllm_eagle.ops.move_slots import move_accepted

        for logits in self._logits_as_the_head_gives_them():
            for noise in (None, logits.float()):
                draft.grow(
                    [draft.Request(0, self.tree_config.num_draft_tokens)],
                    logits[:, 0],
                    lambda level, logits=logits: logits[:, : level.token_ids.shape[1]],  # type: ignore[misc]
                    self.tree_config,
                    None if noise is None else lambda depth, noise=noise: noise[:, 0],  # type: ignore[misc]
                    draft.Limits(fixed_width=True),
                )
        one = torch.ones(1, dtype=torch.int64, device=self.device)
        table = torch.zeros(1, 1, dtype=torch.int32, device=self.device)  # vLLM's null block
        for _, caches in self._caches:
            move_accepted(caches, table, one, table)
        for layer in self._distinct_layers():
            self._warm_up_attention(layer)

    def _logits_as_the_head_gives_them(self) -> Iterator[torch.Tensor]:
        """Zeros [1, most nodes of a level, vocab]: in one piece, as after filters, and cut out of padded rows, as by vLLM."""
        vocab_size, width = self.model_config.get_vocab_size(), self.tree_config.level_width
        for row in sorted({vocab_size, round_up(vocab_size, DEFAULT_VOCAB_PADDING_SIZE)}):
            yield torch.zeros(1, width, row, dtype=self.dtype, device=self.device)[:, :, :vocab_size]

    def _warm_up_attention(self, layer: Attention) -> None:
        one = torch.ones(1, dtype=torch.int64, device=self.device)
        num_blocks = cdiv(self.max_model_len, layer.kv_cache.shape[2])
        table = torch.zeros(1, num_blocks, dtype=torch.int32, device=self.device)  # vLLM's null block
        for num_rows in sorted({max(1, stacked * layer.num_kv_heads // layer.num_heads) for stacked in (16, 32, 64, 128)}):
            visible = torch.ones(1, num_rows, num_rows, dtype=torch.bool, device=self.device).tril()
            rows = TreeRows(table, one, one - 1, one * num_rows, one - 1, one * num_rows, visible)
            query = torch.zeros(num_rows, layer.num_heads, layer.head_size, dtype=self.dtype, device=self.device)
            own = query[:, : layer.num_kv_heads]
            for longest in (1, self.max_model_len):  # in one part, and in several
                trees = TreePass(layer, query, own, own, layer.kv_cache, rows, longest, torch.empty_like(query))
                layer.impl.attend(trees)

    def _distinct_layers(self) -> Iterator[Attention]:
        """One layer of each kind that kernels are compiled for."""
        seen = set()
        for group in self.kv_cache_config.kv_cache_groups:
            for layer in map(self._layer, group.layer_names):
                impl, cache = layer.impl, layer.kv_cache
                shape = (layer.num_heads, layer.num_kv_heads, layer.head_size, cache.dtype, cache.shape[2], cache.stride())
                kind = (*shape, impl.sliding_window, bool(impl.logits_soft_cap))
                if kind not in seen:
                    seen.add(kind)
                    yield layer

    def _layer(self, name: str) -> Attention:
        return self.compilation_config.static_forward_context[name]

    def _move_accepted(self, batch: TreeBatch, paths: list[list[int]]) -> None:
        from vllm_eagle.ops.move_slots import move_accepted

        padded = np.zeros((len(paths), max(map(len, paths))), dtype=np.int32)
        for row, path in zip(padded, paths, strict=True):
            row[: len(path)] = path
        sent = [async_tensor_h2d(x, device=self.device) for x in (batch.req_indices, batch.context_lens, padded)]
        for gid, caches in self._caches:
            block_table = self.input_batch.block_table[gid].get_device_tensor(self.input_batch.num_reqs)
            move_accepted(caches, block_table[sent[0]], *sent[1:])

    def _to_list(self, sampled_token_ids: torch.Tensor) -> list[list[int]]:
        """As vLLM's, which copies from the GPU and waits; the scorer's tokens are on the host already."""
        return sampled_token_ids.tolist() if sampled_token_ids.is_cpu else super()._to_list(sampled_token_ids)

    @torch.inference_mode()
    def _dummy_sampler_run(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As vLLM's, while memory is held as in a step with trees, so that profiling leaves room for it.

        vLLM takes one row of logits per request, [num_reqs, vocab]. A step with trees has one per node of all trees,
        [most_nodes, vocab] in the model's type, until it ends; on top of them in turn their copy in float32, where all requests
        are greedy, what vLLM's sampler makes of as many rows as it is given at once, and what ranking the widest level of drafts
        takes. The features that wait for the head (`BACKLOG_BYTES`) are counted in, too.
        """
        vocab_size = self.model_config.get_vocab_size()
        backlog = torch.empty(BACKLOG_BYTES, dtype=torch.uint8, device=self.device)
        features = hidden_states.new_zeros(self.most_nodes, hidden_states.shape[-1])
        # With adapters, logits want a real batch.
        logits = self.model.compute_logits(features) if self.lora_config is None else features.new_zeros(len(features), vocab_size)
        Sampler.greedy_sample(logits.to(torch.float32))
        rows = hidden_states.new_zeros(max(len(hidden_states), self.most_sampled_rows), hidden_states.shape[-1])
        sampled = super()._dummy_sampler_run(rows)
        level = torch.empty(self.most_level_rows * vocab_size, _BYTES_PER_DRAFT_LOGIT, dtype=torch.uint8, device=self.device)
        del backlog, logits, level
        return sampled
