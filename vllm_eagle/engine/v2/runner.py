"""vLLM's V2 model runner with draft trees. One step:

    prepare_attn              slots from consecutive positions, then positions by depth
    model_state.prepare_attn  the trees handed to attention
    sample                    all nodes sampled, the walk (sampler.py); the accepted paths' keys and values compacted
    speculator.propose        the next trees (speculator.py)

Everything else is vLLM's. Its scheduler knows only how many drafts a request has; which they are, and all that is known of trees,
stays on the device (slots.py), so steps are scheduled ahead and the host waits for nothing.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.states import SamplingStates

from vllm_eagle.algorithm.config import CONFIG_KEY, TreeConfig
from vllm_eagle.attention.interface import check_layers
from vllm_eagle.engine.draft_vocab import logits_of
from vllm_eagle.engine.v2.late import LateReads
from vllm_eagle.engine.v2.sampler import TreeSampler
from vllm_eagle.engine.v2.slots import SlotTrees
from vllm_eagle.engine.v2.speculator import TreeSpeculator
from vllm_eagle.metrics.counters import TreeMetrics
from vllm_eagle.ops.rows import TreeRows
from vllm_eagle.options.per_request import RequestOptions

logger = init_logger(f"vllm.{__name__}")  # below "vllm", so that vLLM shows it with its own lines


class EagleTreeRunner:
    """A mixin: to be put before vLLM's V2 runner of a device, which all derive from its GPUModelRunner."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device):
        super().__init__(vllm_config, device)
        runner: Any = self
        spec = vllm_config.speculative_config
        self.tree_config = TreeConfig.from_options(spec.num_speculative_tokens, vllm_config.additional_config.get(CONFIG_KEY, {}))
        self.tree_metrics = TreeMetrics()
        self._late = LateReads()
        self.trees = SlotTrees(runner.max_num_reqs, spec.num_speculative_tokens + 1, device)
        self.request_options = [RequestOptions()] * runner.max_num_reqs
        self._depends_on_path = np.zeros(runner.max_num_reqs, dtype=bool)
        # vLLM's own was chosen by method; it holds no weights yet.
        runner.speculator = TreeSpeculator(vllm_config, device, self.tree_config, self)
        logger.info("Draft trees: %s", self.tree_config)

    @property
    def states(self) -> SamplingStates:
        """vLLM's sampling parameters, by slot."""
        return self.sampler.sampling_states

    @property
    def paths(self) -> torch.Tensor:
        """[num_reqs, max_depth] int32, accepted nodes of this step, then zeros."""
        return self.rejection_sampler.paths

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; then put our sampler and metadata in their places, and ask every attention layer whether it can run trees.

        Raises:
            ValueError: a layer cannot; the message says why.
        """
        super().load_model(*args, **kwargs)
        runner: Any = self
        runner.speculator.logits = logits_of(
            runner.speculator.model, runner.model, runner.vllm_config, self.tree_config, runner.device
        )
        check_layers(runner.compilation_config.static_forward_context, runner.max_model_len)
        runner.rejection_sampler = TreeSampler(
            runner.sampler,
            runner.speculative_config,
            runner.device,
            self.trees,
            self.tree_config.depth_limit,
            self._depends_on_path,
        )
        prepare = runner.model_state.prepare_attn

        def with_trees(input_batch: InputBatch, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return self._attach(prepare(input_batch, *args, **kwargs), input_batch)

        runner.model_state.prepare_attn = with_trees

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; then prepare compaction."""
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        self._prepare_moves()

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        """As vLLM's; then read what the new requests ask of trees, and leave no tree in their slots."""
        super().add_requests(scheduler_output)
        runner: Any = self
        for new in scheduler_output.scheduled_new_reqs:
            slot, params = runner.req_states.req_id_to_index[new.req_id], new.sampling_params
            self.request_options[slot] = self._options(new.req_id, params)
            self._depends_on_path[slot] = _depends_on_path(params) or bool(runner.model_config.logits_processors)

    def _options(self, req_id: str, params: SamplingParams) -> RequestOptions:
        try:
            found = RequestOptions.from_extra_args(params.extra_args)
        except ValueError as error:  # refused before it comes here, where the plugin is loaded
            logger.error("Request %s: %s; it is answered as if it had not asked.", req_id, error)
            found = RequestOptions()
        # The scheduler makes bitmasks along a chain.
        return dataclasses.replace(found, topk=1) if params.structured_outputs is not None else found

    def prepare_attn(self, input_batch: InputBatch) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """As vLLM's, which takes slots from consecutive positions: there the nodes belong. Then positions go by depth."""
        found = super().prepare_attn(input_batch)
        if input_batch.num_draft_tokens:
            rows, nodes = input_batch.logits_indices, input_batch.expanded_local_pos.long()
            input_batch.positions[rows] += self.trees.depths[input_batch.expanded_idx_mapping, nodes] - nodes
        return found

    def sample(
        self, hidden_states: torch.Tensor, input_batch: InputBatch, grammar_output: GrammarOutput | None
    ) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """As vLLM's; then the accepted paths' keys and values go to the slots of their positions."""
        found = super().sample(hidden_states, input_batch, grammar_output)
        self._late.poll()
        self.tree_metrics.add("num_passes")
        self.tree_metrics.counts["num_requests"] = input_batch.num_reqs
        if input_batch.num_draft_tokens:
            self._late.send(self._count, self.rejection_sampler.num_nodes, self.paths)
            context_lens = input_batch.seq_lens[: input_batch.num_reqs].long() - input_batch.cu_num_logits.diff().long()
            for group, moves in self._moves:
                moves(self.block_tables.input_block_tables[group][: input_batch.num_reqs], context_lens, self.paths)
        return found

    def _count(self, num_nodes: np.ndarray, paths: np.ndarray) -> None:
        """Add a step's verifications to the counters."""
        depths = np.arange(1, paths.shape[1] + 1)
        for nodes, path in zip(num_nodes.tolist(), paths, strict=True):
            if nodes > 1:
                self.tree_metrics.count_verification(nodes - 1, int(np.count_nonzero(path)), len(num_nodes))
        self.tree_metrics.add("num_moved", int(np.count_nonzero(paths > depths)))

    def _attach(self, metadata: dict[str, Any], batch: InputBatch) -> dict[str, Any]:
        """The target's layers get the batch's trees. Requests with drafts come first in vLLM's batches."""
        if not batch.num_draft_tokens:
            return metadata
        runner: Any = self
        num_trees = int(np.count_nonzero(batch.num_draft_tokens_per_req))
        slots, cuts = batch.idx_mapping[:num_trees], batch.cu_num_logits[: num_trees + 1].long()
        first_rows, num_rows = batch.logits_indices[cuts[:-1]], cuts.diff()
        context_lens = batch.seq_lens[:num_trees].long() - num_rows
        longest = int(batch.seq_lens_cpu_upper_bound[:num_trees].max())
        query_start_loc = torch.from_numpy(batch.query_start_loc_np[: batch.num_reqs + 1])
        ancestors = self.trees.ancestors[slots]
        with_trees: dict[int, Any] = {}
        for groups in runner.attn_groups:
            for group in groups:
                for name in group.layer_names:
                    if name in runner.speculator.draft_attn_layer_names:  # whose first pass is over chains
                        continue
                    shared = metadata[name]  # by layers of a group, the head's among them
                    if id(shared) not in with_trees:
                        with_trees[id(shared)] = own = dataclasses.replace(shared)
                        rows = TreeRows(
                            own.block_table[:num_trees], context_lens, first_rows, num_rows, first_rows, num_rows, ancestors
                        )
                        group.get_metadata_builder().attach_prefix(own, rows, query_start_loc, longest)
                    metadata[name] = with_trees[id(shared)]
        return metadata

    def _prepare_moves(self) -> None:
        """Fill `_moves`: per group of caches, what moves (block table, context lengths, paths)."""
        raise NotImplementedError

    def _target_layers(self) -> Iterator[tuple[int, list[Attention]]]:
        """Layers whose caches hold tree nodes, by group: together those whose caches have one shape."""
        runner: Any = self
        context = runner.compilation_config.static_forward_context
        for gid, group in enumerate(runner.kv_cache_config.kv_cache_groups):
            layers = [context[name] for name in group.layer_names if name not in runner.speculator.draft_attn_layer_names]
            by_shape: dict[torch.Size, list[Attention]] = {}
            for layer in {layer.kv_cache.data_ptr(): layer for layer in layers}.values():  # those that share a cache once
                by_shape.setdefault(layer.kv_cache.shape, []).append(layer)
            for alike in by_shape.values():
                yield gid, alike


class EagleTreeGPUModelRunner(EagleTreeRunner, GPUModelRunner):
    """On CUDA. Not run on a GPU yet."""

    def _prepare_moves(self) -> None:
        from functools import partial

        from vllm_eagle.ops.move_slots import Caches, move_accepted

        self._moves = [
            (gid, partial(move_accepted, Caches.of([layer.kv_cache for layer in layers]))) for gid, layers in self._target_layers()
        ]


def _depends_on_path(params: SamplingParams) -> bool:
    """Whether what may follow a node depends on more than its position: see by_depth.py."""
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
        or bool(params.bad_words)
        or params.thinking_token_budget is not None
    )
