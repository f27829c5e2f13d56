"""vLLM's V2 model runner with draft trees. One step:

    prepare_attn              slots from consecutive positions, then positions by depth
    model_state.prepare_attn  the trees handed to attention
    sample                    all nodes sampled, the walk (sampler.py); the accepted paths' keys and values compacted
    speculator.propose        the next trees (speculator.py)

Everything else is vLLM's. Its scheduler knows only how many drafts a request has; which they are, and all that is known of trees,
stays on the device (slots.py), so steps are scheduled ahead and the host waits for nothing: what it wants to know comes late
(late.py, counting.py). Passes of decoding requests can be captured in CUDA graphs. Not run on a GPU yet.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.states import SamplingStates
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

from vllm_eagle.algorithm.config import CONFIG_KEY, TreeConfig
from vllm_eagle.attention.interface import check_layers
from vllm_eagle.engine.draft_vocab import logits_of
from vllm_eagle.engine.grammars import grammars_follow_trees
from vllm_eagle.engine.head_window import limit_head
from vllm_eagle.engine.layers import blocks_are_given_back, target_layers
from vllm_eagle.engine.loaded import language_model_of, name_aux_layers
from vllm_eagle.engine.v2 import measuring
from vllm_eagle.engine.v2.backlog import Backlog
from vllm_eagle.engine.v2.budgeting import Budgeting
from vllm_eagle.engine.v2.counting import Counting, Step
from vllm_eagle.engine.v2.drafts import Drafts, said, say
from vllm_eagle.engine.v2.grammars import TreeTokens
from vllm_eagle.engine.v2.late import LateReads
from vllm_eagle.engine.v2.sampler import TreeSampler
from vllm_eagle.engine.v2.slots import BatchTrees, SlotTrees
from vllm_eagle.engine.v2.speculator import TreeSpeculator
from vllm_eagle.engine.v2.split import DraftSplit
from vllm_eagle.metrics.counters import TreeMetrics, TreeTrace
from vllm_eagle.ops.move_slots import Caches, move_accepted
from vllm_eagle.options.per_request import RequestOptions

logger = init_logger(f"vllm.{__name__}")  # below "vllm", so that vLLM shows it with its own lines

_OF_VLLM = (BadWordsState, LogitBiasState, PenaltiesState)  # among its logits processors; the others are custom
# What a level holds per logit at the most: logits in 16 bits, and filtering them two copies in 32.
_BYTES_PER_DRAFT_LOGIT = 10


class EagleTreeRunner(GPUModelRunner):
    """vLLM's V2 runner, verifying trees. That of another device derives from this one and from vLLM's, in this order."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device):
        super().__init__(vllm_config, device)
        spec = vllm_config.speculative_config
        self.tree_config = TreeConfig.from_options(spec.num_speculative_tokens, vllm_config.additional_config.get(CONFIG_KEY, {}))
        self.late = LateReads(device)
        self.trees = SlotTrees(self.max_num_reqs, spec.num_speculative_tokens + 1, device)
        self.draft_tokens_handler = TreeTokens(device, self.trees)
        self.batch_trees = BatchTrees(self.max_num_reqs, spec.num_speculative_tokens + 1, device)
        self.request_options = [RequestOptions()] * self.max_num_reqs
        self._depends_on_path = np.zeros(self.max_num_reqs, dtype=bool)
        self._rows_of_logits: np.ndarray | None = None  # [num_reqs] of this step; None: one each
        self.step = Step(is_first=True)
        self.drafts: Drafts | None = None  # what is planned for this step; None: as much as allowed
        # vLLM's own was chosen by method; it holds no weights yet.
        self.speculator = TreeSpeculator(vllm_config, device, self.tree_config, self)
        logger.info("Draft trees: %s", self.tree_config)

    def init_trees(self, metrics: TreeMetrics) -> None:
        """Count from here on."""
        head, target = self.speculative_config.draft_model_config.model, self.model_config.model
        self.counting = Counting(metrics, self.late, head, target, tells=self.parallel_config.rank == 0)

    def forget_warm_up(self) -> None:
        """Count anew: vLLM's warm-up has run steps with requests of its own."""
        if self.device.type == "cuda":
            torch.accelerator.synchronize()
        metrics = self.tree_metrics
        metrics.reset()
        self.init_trees(metrics)

    @property
    def tree_metrics(self) -> TreeMetrics:
        """Counters, with all that has arrived."""
        self.late.poll()
        return self.counting.metrics

    @property
    def tree_trace(self) -> TreeTrace:
        """The last trees, with all that has arrived."""
        self.late.poll()
        return self.counting.trace

    @property
    def states(self) -> SamplingStates:
        """vLLM's sampling parameters, by slot."""
        return self.sampler.sampling_states

    @property
    def token_ids(self) -> torch.Tensor:
        """[num_slots, max_model_len] int32, prompts and what was emitted."""
        return self.req_states.all_token_ids.gpu

    @property
    def paths(self) -> torch.Tensor:
        """[num_reqs, max_depth] int32, accepted nodes of this step, then zeros."""
        return self.rejection_sampler.paths

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; then put our sampler and metadata in their places, and ask every attention layer whether it can run trees.

        Raises:
            ValueError: something is missing in the head, or a layer cannot; the message says why.
        """
        name_aux_layers(self.vllm_config)
        super().load_model(*args, **kwargs)
        target = language_model_of(self.model)
        self.speculator.logits = logits_of(self.speculator.model, target, self.vllm_config, self.tree_config, self.device)
        if self.tree_config.budget:
            self.speculator.backlog = Backlog(self.max_num_reqs, self.dtype, self.device)
        layers = self.compilation_config.static_forward_context
        check_layers(layers, self.max_model_len)
        if self.tree_config.draft_window is not None:  # a head's own is for CPUs: most backends here have none (support.py)
            limit_head(self.vllm_config, self.tree_config, layers, self.speculator.draft_attn_layer_names)
        self.rejection_sampler = TreeSampler(
            self.sampler, self.speculative_config, self.device, self.trees, self.tree_config.depth_limit, self._depends_on_path
        )
        self._has_processors = any(not isinstance(each, _OF_VLLM) for each in self.sampler.logits_processors)
        prepare = self.model_state.prepare_attn

        def with_trees(batch: InputBatch, mode: CUDAGraphMode, tables: Any, slots: Any, groups: Any, *args: Any, **kwargs: Any):
            is_whole = mode == CUDAGraphMode.FULL or kwargs.get("for_capture", False)
            return self._attach(prepare(batch, mode, tables, slots, groups, *args, **kwargs), batch, groups, is_whole)

        self.model_state.prepare_attn = with_trees
        if self.model_state.rope_state is not None:
            self.model_state.prepare_inputs = self._by_depth(self.model_state.prepare_inputs)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; then prepare compaction, and with a budget captured passes of requests with unequal numbers of rows."""
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        self._prepare_moves()
        if blocks_are_given_back(kv_cache_config, self.speculator.draft_attn_layer_names):
            self.speculator.backlog = None  # what was put off would be written to blocks that others may have by then
        if not self.tree_config.budget:
            return
        self.cudagraph_manager = ModelCudaGraphManager(
            self.vllm_config,
            self.device,
            self.cudagraph_manager.cudagraph_mode,
            decode_query_len=self.decode_query_len,
            lora_capture_cases=self.lora_capture_cases,
            varlen_decode=True,
        )
        if self.lora_config is None:  # adapters go by rows that the host knows
            self.adaptive_verification = DraftSplit(
                self.req_states,
                self.input_buffers.query_start_loc,
                self.model_state.num_new_sampled_tokens_per_step,
                max_total_logits=get_max_chunk_logits(self.vocab_size),
            )

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        """As vLLM's; then read what the new requests ask of trees."""
        super().add_requests(scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            slot, params = self.req_states.req_id_to_index[new.req_id], new.sampling_params
            self.request_options[slot] = self._options(new.req_id, params)
            if self.speculator.backlog is not None:
                self.speculator.backlog.forget(slot)
            self._depends_on_path[slot] = _depends_on_path(params) or self._has_processors

    def _options(self, req_id: str, params: SamplingParams) -> RequestOptions:
        try:
            found = RequestOptions.from_extra_args(params.extra_args)
        except ValueError as error:  # refused before it comes here, where the plugin is loaded
            logger.error("Request %s: %s; it is answered as if it had not asked.", req_id, error)
            found = RequestOptions()
        if params.structured_outputs is None or grammars_follow_trees(self.vllm_config):
            return found
        return dataclasses.replace(found, topk=1)  # vLLM makes bitmasks along a chain

    def measure_costs(self) -> None:
        """Find out what passes cost here, for the budget; takes seconds."""
        if not self.tree_config.budget:
            return
        budget = measuring.measured(self)
        if self.parallel_config.rank == 0:  # whose word the others get with what is scheduled
            self.counting.budgeting = Budgeting(budget, self.tree_config, splits=self.adaptive_verification is not None)

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, after a look at what has arrived of earlier steps and at what is planned."""
        self.late.poll()
        self.drafts = said(scheduler_output)
        if isinstance(self.adaptive_verification, DraftSplit):
            self.adaptive_verification.has_drafted = False
            self.adaptive_verification.per_request = None if self.drafts is None else self.drafts.per_request
        self.step = Step(
            is_first=bool(scheduler_output.scheduled_new_reqs), num_trees=len(scheduler_output.scheduled_spec_decode_tokens)
        )
        self._rows_of_logits = None
        self.mark("verify")
        return super().execute_model(scheduler_output, *args, **kwargs)

    def mark(self, stage: str) -> None:
        """A stage of the step begins."""
        self.step.marks.append((stage, self.late.mark()))

    def prepare_attn(self, input_batch: InputBatch) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """As vLLM's, which takes slots from consecutive positions: there the nodes belong. Then positions go by depth."""
        found = super().prepare_attn(input_batch)
        if input_batch.num_draft_tokens:
            self._rows_of_logits = input_batch.num_draft_tokens_per_req + 1
            input_batch.positions[input_batch.logits_indices] += self._lifts(input_batch)
        return found

    def _lifts(self, batch: InputBatch) -> torch.Tensor:
        """What the position of each row of logits changes by where it goes by depth, [num_rows]."""
        nodes = batch.expanded_local_pos.long()
        return self.trees.depths[batch.expanded_idx_mapping, nodes] - nodes

    def _by_depth(self, prepare: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        """M-RoPE's positions, in three rows: of what is decoded these move alike."""

        def prepare_inputs(batch: InputBatch, *args: Any) -> dict[str, Any]:
            found = prepare(batch, *args)
            if batch.num_draft_tokens:
                found["positions"][:, batch.logits_indices] += self._lifts(batch)
            return found

        return prepare_inputs

    def _set_active_loras(self, prompt_lora_mapping: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        """As vLLM's, which takes one row of logits per request."""
        if self._rows_of_logits is not None:
            prompt_lora_mapping = tuple(np.repeat(prompt_lora_mapping, self._rows_of_logits).tolist())
        super()._set_active_loras(prompt_lora_mapping, *args, **kwargs)

    def sample(
        self, hidden_states: torch.Tensor, input_batch: InputBatch, grammar_output: GrammarOutput | None
    ) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """As vLLM's; then the accepted paths' keys and values go to the slots of their positions."""
        batch = input_batch
        self.mark("accept")
        found = super().sample(hidden_states, batch, grammar_output)
        self.mark("compact")
        if batch.num_draft_tokens:
            slots, walked = batch.idx_mapping, self.rejection_sampler
            self.counting.verified(
                batch.req_ids, walked.num_nodes, walked.paths, found[0].sampled_token_ids, self.trees.token_ids[slots],
                self.trees.parents[slots], self.trees.scores[slots],
            )  # fmt: skip
            context_lens = batch.seq_lens[: batch.num_reqs].long() - batch.cu_num_logits.diff().long()
            for group, moves in self._moves:
                moves(self.block_tables.input_block_tables[group][: batch.num_reqs], context_lens, self.paths)
        self.mark("first")
        return found

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        """As vLLM's, and count."""
        state = self.execute_model_state
        found = super().sample_tokens(grammar_output)
        if state is not None:
            batch = state.input_batch
            self.step.num_reqs, self.step.num_tokens = batch.num_reqs, batch.num_tokens
            self.step.num_prompt_tokens = int(batch.num_scheduled_tokens[batch.is_prefilling_np].sum())
            self.counting.step(self.step)
            if self.speculator.is_off:
                say(found.model_runner_output, Drafts(0, 0))
            elif self.counting.budgeting is not None:
                say(found.model_runner_output, self.counting.budgeting.plan(batch.num_reqs))
        return found

    def drafted(self, batch: InputBatch, depth: int) -> None:
        """Count what was drafted."""
        self.step.depth = depth
        if isinstance(self.adaptive_verification, DraftSplit):
            self.adaptive_verification.has_drafted = True
        wanted = batch.num_computed_prefill_tokens_np + batch.num_scheduled_tokens >= batch.prefill_len_np
        trees, slots = self.trees, batch.idx_mapping
        self.counting.drafted(depth, wanted, trees.num_nodes[slots], trees.scores[slots], trees.depths[slots], trees.parents[slots])
        mine, backlog = batch.idx_mapping_np[wanted], self.speculator.backlog
        off = sum(self.request_options[slot].num_draft_tokens == 0 for slot in mine)
        lost = 0 if backlog is None else sum(backlog.is_lost(slot) for slot in mine)
        for decision, number in (("switched_off", off), ("left_behind", lost), ("tree", int(wanted.sum()) - off - lost)):
            self.counting.metrics.count_decision(decision, number)

    def drafting_failed(self) -> None:
        """Say so, once; from the next step on the scheduler is told to schedule no drafts."""
        logger.exception(
            "Drafting failed. Speculation is off until the server is started anew; answers go on, exact, one token per pass."
        )
        self.counting.metrics.add("num_drafting_errors")
        self.counting.metrics.counts["speculation_off"] = 1

    @torch.inference_mode()
    def _dummy_sampler_run(self, hidden_states: torch.Tensor) -> None:
        """As vLLM's, while memory is held as in a step with trees, so that profiling leaves room for it.

        vLLM takes one row of logits per request, [num_reqs, vocab]. A step with trees has one per node of all trees,
        [most_nodes, vocab] in the model's type, until it ends; on top of them in turn a part of them in float32, and what ranking
        the widest level of drafts takes.
        """
        most_nodes = min(self.max_num_tokens, self.max_num_reqs * (1 + self.tree_config.num_draft_tokens))
        features = hidden_states.new_zeros(most_nodes, hidden_states.shape[-1])
        # With adapters, logits want a real batch.
        logits = (
            self.model.compute_logits(features) if self.lora_config is None else features.new_zeros(most_nodes, self.vocab_size)
        )
        torch.empty(
            min(most_nodes, get_max_chunk_logits(self.vocab_size)), self.vocab_size, dtype=torch.float32, device=self.device
        )
        super()._dummy_sampler_run(hidden_states)
        most_rows = min(self.speculator.most_level_rows, self.max_num_reqs * self.tree_config.level_width)
        level = torch.empty(most_rows * self.vocab_size, _BYTES_PER_DRAFT_LOGIT, dtype=torch.uint8, device=self.device)
        del logits, level

    def _attach(self, metadata: dict[str, Any], batch: InputBatch, groups: Any, is_whole: bool) -> dict[str, Any]:
        """The target's layers get the batch's trees. Requests with drafts come first in vLLM's batches.

        In a pass that is captured as a whole (`is_whole`) all requests have trees, if of the root alone: what differs from step to
        step is in the tensors of `batch_trees` only.
        """
        if not is_whole and not batch.num_draft_tokens:
            return metadata
        num_trees = batch.num_reqs_after_padding if is_whole else int(np.count_nonzero(batch.num_draft_tokens_per_req))
        longest = self.max_model_len if is_whole else int(batch.seq_lens_cpu_upper_bound[:num_trees].max())
        most_rows = min(self.num_speculative_steps + 1, batch.num_tokens_after_padding)
        query_start_loc = torch.from_numpy(batch.query_start_loc_np[: (num_trees if is_whole else batch.num_reqs) + 1])
        self.batch_trees.fill(self.trees, batch.idx_mapping, batch.query_start_loc[: num_trees + 1], batch.seq_lens[:num_trees])
        with_trees: dict[int, Any] = {}
        for group in (group for same_cache in groups for group in same_cache):
            for name in group.layer_names:
                if name in self.speculator.draft_attn_layer_names:  # whose first pass is over chains
                    continue
                shared = metadata[name]  # by layers of a group, the head's among them
                if id(shared) not in with_trees:
                    with_trees[id(shared)] = own = dataclasses.replace(shared)
                    rows = self.batch_trees.rows(own.block_table[:num_trees], most_rows)
                    group.get_metadata_builder().attach_prefix(own, rows, query_start_loc, longest)
                metadata[name] = with_trees[id(shared)]
        return metadata

    def _prepare_moves(self) -> None:
        """Fill `_moves`: per group of caches, what moves (block table, context lengths, paths).

        Raises:
            ValueError: the caches' layout is none that compaction knows.
        """
        self._moves = []
        for gid, layers in self._target_layers():
            caches, block_size = Caches.of([_with_heads(layer.kv_cache) for layer in layers]), self.block_tables.block_sizes[gid]
            if caches.block_size != block_size:
                raise ValueError(
                    f"attention takes blocks of {caches.block_size} tokens where block_size is {block_size}: "
                    f"set block_size (--block-size) to {caches.block_size}"
                )
            self._moves.append((gid, partial(move_accepted, caches)))

    def _target_layers(self) -> Iterator[tuple[int, list[Any]]]:
        layers = self.compilation_config.static_forward_context
        return target_layers(self.kv_cache_config, layers, self.speculator.draft_attn_layer_names)


def _with_heads(cache: torch.Tensor) -> torch.Tensor:
    """[num_blocks, num_kv_heads, block_size, content]; vLLM's layers of latents, which are of a single head, leave that out."""
    return cache[:, None] if cache.dim() == 3 else cache


def _depends_on_path(params: SamplingParams) -> bool:
    """Whether what may follow a node depends on more than its position: see by_depth.py."""
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
        or bool(params.bad_words)
        or params.thinking_token_budget is not None
    )
