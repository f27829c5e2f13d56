"""The model runner with draft trees. One step:

    _prepare_inputs            lay out the trees that the scheduler scheduled; positions by depth
    _build_attention_metadata  hand the trees to attention
    _sample                    score all nodes, walk (scorer.py)
    _update_states_after_...   compact the accepted paths' keys and values
    drafter.propose            grow the next trees (proposer.py)

Everything else is vLLM's. Trees live here, by request id; vLLM's scheduler sees ordinary draft tokens.
"""

import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from vllm_eagle import compact, native
from vllm_eagle.accept import Walk
from vllm_eagle.budget import Budget, Plan
from vllm_eagle.config import CONFIG_KEY, TreeConfig
from vllm_eagle.draft import Request
from vllm_eagle.engine import costs
from vllm_eagle.engine.costs import StepClock
from vllm_eagle.engine.grammar import TreeGrammars
from vllm_eagle.engine.proposer import DraftPlan, EagleTreeProposer
from vllm_eagle.engine.scorer import PADDING, EagleTreeScorer
from vllm_eagle.metrics import TreeMetrics, TreeTrace
from vllm_eagle.per_request import RequestOptions
from vllm_eagle.tree import DraftTree, depths_of
from vllm_eagle.verify import TreeBatch, lay_out

logger = init_logger(f"vllm.{__name__}")  # below "vllm", so that vLLM shows it with its own lines

_GREEDY_BELOW = 1e-5  # temperatures that vLLM treats as greedy


class EagleTreeCPUModelRunner(CPUModelRunner):
    """vLLM's CPU model runner, verifying trees."""

    def init_trees(self, metrics: TreeMetrics) -> None:
        """Replace drafter, scorer and logits processors; the rest of the runner is as vLLM built it."""
        spec = self.speculative_config
        self.tree_config = TreeConfig.from_options(
            spec.num_speculative_tokens, self.vllm_config.additional_config.get(CONFIG_KEY, {})
        )
        self.tree_metrics = metrics
        self.tree_trace = TreeTrace()
        self._stored: dict[str, DraftTree] = {}  # drafted in the last step, by request id
        self._scheduled: list[DraftTree] = []  # of this step, by row in the batch
        self._tree_batch: TreeBatch | None = None  # those of them that branch
        self._walks: list[Walk] = []
        self._grammar_output: GrammarOutput | None = None  # of this step: what the scheduler's grammars allow
        self._grammars = TreeGrammars(self.vllm_config)
        self._options: dict[str, RequestOptions] = {}  # by request id
        self._prompt_rows: list[int] = []  # rows of this step that hold more than the last token and its tree
        self.budget: Budget | None = None  # from `measure_costs` on; None: as many nodes as allowed
        self._clock = StepClock(metrics)
        self._drafting = Plan(0)  # of this step
        self.scorer = EagleTreeScorer(self.sampler)
        self.drafter = EagleTreeProposer(
            self.vllm_config,
            self.device,
            self.tree_config,
            plan=self._plan,
            constraints=lambda rows: self._grammars.constraints([self.input_batch.req_ids[row] for row in rows]),
            keep=self._keep_trees,
            paths=lambda: [walk.path for walk in self._walks],
        )
        # vLLM leaves min-p, logit bias and custom processors out under speculation; the scorer runs them as plain decoding does.
        without_speculation = copy.copy(self.vllm_config)
        without_speculation.speculative_config = None
        custom = tuple(self.model_config.logits_processors or ())
        self.input_batch.logitsprocs = build_logitsprocs(without_speculation, self.device, PIN_MEMORY, False, custom)
        self.input_batch.logitsprocs_need_output_token_ids = bool(custom)
        logger.info("Draft trees: %s", self.tree_config)

    def load_model(self, load_dummy_weights: bool = False) -> None:
        """As vLLM's; then ask every attention layer, the head's included, whether it can run trees.

        Raises:
            ValueError: a layer cannot; the message says why.
        """
        super().load_model(load_dummy_weights)
        native.runs()  # built now if need be, not while the first request waits
        for name, layer in self.compilation_config.static_forward_context.items():
            if isinstance(layer, Attention):
                reasons = layer.impl.not_supported_reasons(self.max_model_len)
                if reasons:
                    raise ValueError(f"vllm_eagle cannot run draft trees with layer {name}: {'; '.join(reasons)}")

    def measure_costs(self) -> None:
        """Find out what passes cost here, for the budget; takes seconds."""
        if not self.tree_config.budget:
            return

        def target_pass(num_tokens: int) -> None:
            hidden, _ = self._dummy_run(num_tokens)
            if self.lora_config is None:  # with adapters, logits want a real batch
                self.model.compute_logits(hidden[:num_tokens])

        def head_pass(num_tokens: int) -> None:
            self.drafter.dummy_run(num_tokens)
            self.drafter.model.compute_logits(self.drafter.hidden_states[:num_tokens])

        most = min(self.max_num_tokens, self.max_num_reqs * (1 + self.tree_config.num_draft_tokens))
        self.drafter.measuring_target = True
        try:
            target = costs.measure(target_pass, most)
        finally:
            self.drafter.measuring_target = False
        head = costs.measure(head_pass, most)
        target, head = (costs.agreed(curve) for curve in (target, head))
        self.budget = Budget(target, head, self.tree_config.num_draft_tokens, self.tree_config.depth_limit)
        for name, curve in (("target", target), ("head", head)):
            logger.info("Draft trees: milliseconds of a pass of the %s by tokens in it: %s", name, curve)

    def _keep_trees(self, trees: dict[int, DraftTree]) -> dict[int, DraftTree]:
        self.tree_metrics.add("num_drafted", sum(tree.num_nodes - 1 for tree in trees.values()))
        if self.budget is not None:
            scores, depths = [tree.scores[1:] for tree in trees.values()], [x[1:] for x in depths_of(list(trees.values()))]
            numbers = self.budget.keep(scores, depths, self._drafting.depth, self._num_decoding)
            trees = {row: tree.prefix(1 + number) for (row, tree), number in zip(trees.items(), numbers, strict=True)}
        for row, tree in trees.items():
            self._stored[self.input_batch.req_ids[row]] = tree
            self.tree_metrics.count_decision("tree" if tree.num_nodes > 1 else "budget")
        return trees

    @property
    def _num_decoding(self) -> int:
        """Requests that will be in the next pass with their last token."""
        return self.input_batch.num_reqs - int(self.discard_request_mask.np[: self.input_batch.num_reqs].sum())

    def _on_request_state_removed(self, req_id: str, req_state: CachedRequestState | None) -> None:
        super()._on_request_state_removed(req_id, req_state)
        self._stored.pop(req_id, None)
        self._options.pop(req_id, None)
        self._grammars.forget(req_id)
        self.drafter.forget(req_id)

    def _input_fits_in_drafter(self, common_attn_metadata: CommonAttentionMetadata | None) -> bool:
        # vLLM stops drafting for the whole batch when one request nears the model's length; we stop per request.
        return common_attn_metadata is not None

    def _prepare_inputs(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray
    ) -> tuple[torch.Tensor, SpecDecodeMetadata | None, int]:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        for req_id in self.input_batch.req_ids:
            if req_id not in self._options:
                self._welcome(req_id)
        ends = np.cumsum(num_scheduled_tokens)
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        self._scheduled = [self._scheduled_tree(req_id, scheduled.get(req_id, [])) for req_id in self.input_batch.req_ids]
        computed, in_prompt = self.input_batch.num_computed_tokens_cpu, self.input_batch.num_prompt_tokens
        self._prompt_rows = [
            row
            for row, tree in enumerate(self._scheduled)
            if num_scheduled_tokens[row] > tree.num_nodes or computed[row] < in_prompt[row]
        ]
        # A chain, and a root alone, is what vLLM expects: its own kernel, positions and slots are right as they are.
        with_tree = [row for row, tree in enumerate(self._scheduled) if not tree.is_chain]
        self._tree_batch = None
        if with_tree:
            trees = [self._scheduled[row] for row in with_tree]
            context_lens = [
                self.input_batch.num_computed_tokens_cpu[row] + num_scheduled_tokens[row] - tree.num_nodes
                for row, tree in zip(with_tree, trees, strict=True)
            ]
            first_rows = [ends[row] - tree.num_nodes for row, tree in zip(with_tree, trees, strict=True)]
            self._tree_batch = lay_out(trees, with_tree, first_rows, context_lens)
            # vLLM derived slots from consecutive positions, which is where we want the nodes; positions go by depth.
            rows = torch.from_numpy(self._tree_batch.rows)
            self.positions[rows] = torch.from_numpy(self._tree_batch.positions).to(self.positions.dtype)
        self._own_noise_streams()
        return prepared

    def _welcome(self, req_id: str) -> None:
        state = self.requests[req_id]
        self._options[req_id] = RequestOptions.from_extra_args(state.sampling_params.extra_args)
        self._grammars.start(req_id, state)

    def _scheduled_tree(self, req_id: str, token_ids: list[int]) -> DraftTree:
        """The tree behind the draft tokens that the scheduler scheduled for a request."""
        if not token_ids:
            return DraftTree.root_only(PADDING)
        if token_ids[0] == PADDING:  # vLLM pads a new request to the size of running ones; such nodes match nothing
            return DraftTree.chain([PADDING, *token_ids])
        stored = self._stored.get(req_id)
        if stored is None or stored.draft_token_ids[: len(token_ids)] != token_ids:
            raise RuntimeError(
                f"request {req_id}: scheduled draft tokens {token_ids} are no prefix of the tree that was drafted "
                f"({None if stored is None else stored.draft_token_ids}). Something between worker and scheduler changed "
                "them; this is a bug in vllm_eagle or in another plugin."
            )
        return stored.prefix(len(token_ids) + 1)

    def _own_noise_streams(self) -> None:
        """Give unseeded sampling requests a private generator, so that their coming noise can be known too."""
        batch = self.input_batch
        for row, req_id in enumerate(batch.req_ids):  # in an order that all tensor-parallel ranks share
            if req_id in batch.random_reqs and row not in batch.generators:
                seed = int(torch.randint(0, 2**63 - 1, (1,)))
                generator = torch.Generator(device=self.device).manual_seed(seed)
                self.requests[req_id].generator = batch.generators[row] = generator

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], CommonAttentionMetadata | None]:
        metadata, common = super()._build_attention_metadata(*args, **kwargs)
        if self._tree_batch is not None and not kwargs.get("for_cudagraph_capture", False):
            attached: set[int] = set()
            for group in self._attn_group_iterator():
                group_metadata = metadata[group.layer_names[0]]
                if id(group_metadata) not in attached:  # layers of a group share one object
                    group.get_metadata_builder().attach(group_metadata, self._tree_batch)
                    attached.add(id(group_metadata))
        return metadata, common

    @torch.inference_mode()
    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, timed."""
        self._clock.start_step()
        with self.tree_metrics.timed("verify"):
            return super().execute_model(*args, **kwargs)

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        """As vLLM's, but grammars are applied node by node in `_sample` instead of to all rows at once."""
        self._grammar_output = grammar_output
        return super().sample_tokens(None)

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None) -> SamplerOutput:
        num_reqs = self.input_batch.num_reqs
        discarded = set(np.flatnonzero(self.discard_request_mask.np[:num_reqs]).tolist())
        with self.tree_metrics.timed("accept"):
            output, self._walks = self.scorer.score(
                logits,
                self._scheduled,
                self.input_batch.sampling_metadata,
                [self.requests[req_id].output_token_ids for req_id in self.input_batch.req_ids],
                discarded,
                self._grammars.masks(self.input_batch.req_ids, [tree.num_nodes for tree in self._scheduled], self._grammar_output),
            )
        self._count(discarded)
        return output

    def _count(self, discarded: set[int]) -> None:
        num_reqs = len(self._walks)
        self.tree_metrics.add("num_passes")
        self.tree_metrics.counts["num_requests"] = num_reqs
        scores, accepted = [], []
        for row, walk in enumerate(self._walks):
            nodes = walk.tree.num_nodes
            if nodes == 1 or row in discarded:
                continue
            self.tree_metrics.count_verification(nodes - 1, len(walk.path), num_reqs)
            self.tree_trace.record(self.input_batch.req_ids[row], walk)
            if walk.tree.token_ids[1] != PADDING:  # such nodes are vLLM's, not the head's
                scores.append(walk.tree.scores[1:])
                accepted.append(walk.accepted)
        if self.budget is not None and scores:
            self.budget.calibration.update(np.concatenate(scores), np.concatenate(accepted))
        self.tree_trace.end_step()

    def _update_states_after_model_execute(self, output_token_ids: torch.Tensor, scheduler_output: SchedulerOutput) -> None:
        super()._update_states_after_model_execute(output_token_ids, scheduler_output)
        if self._tree_batch is not None:
            with self.tree_metrics.timed("compact"):
                self._compact(self._tree_batch)
            self._tree_batch = None

    def _compact(self, batch: TreeBatch) -> None:
        paths = [self._walks[row].path for row in batch.req_indices]
        index, sources, targets = compact.moves(paths, batch.context_lens.tolist())
        if len(index) == 0:
            return
        rows = batch.req_indices[index]
        context = self.compilation_config.static_forward_context
        for gid, group in enumerate(self.kv_cache_config.kv_cache_groups):
            # The head's own layer holds no tree nodes; layers that share a cache are moved once.
            names = set(group.layer_names).difference(self.drafter._draft_attn_layer_names)
            layers = list({context[name].kv_cache.data_ptr(): context[name] for name in names}.values())
            if layers:
                block_table, block_size = self.input_batch.block_table[gid].get_numpy_array(), layers[0].kv_cache.shape[2]
                slots = (torch.from_numpy(compact.slots(block_table, rows, x, block_size)) for x in (sources, targets))
                layers[0].impl.move_slots(layers, *slots)
        self.tree_metrics.add("num_moved", len(index))

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        # For requests whose prompt is not complete vLLM rewinds the generator by one draw, which CPU generators cannot do. The
        # scorer drew nothing for them, so there is nothing to rewind: keep their generators out of sight.
        generators = self.input_batch.generators
        discarded = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs]).tolist()
        hidden = {row: generators.pop(row) for row in discarded if row in generators}
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            generators.update(hidden)

    def propose_draft_token_ids(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; if drafting fails, speculation is switched off and decoding goes on without it.

        Nothing that is emitted depends on drafting, so this is exact. With tensor parallelism one rank cannot stop alone, while the
        others wait for it: the error ends the engine there, as vLLM's own errors do.
        """
        if self.tree_metrics.counts["speculation_off"]:
            self.tree_metrics.count_decision("failed", len(self.input_batch.req_ids))
            return [[] for _ in self.input_batch.req_ids]
        try:
            self._learn_costs(args[0])
            with self.tree_metrics.timed("draft"):
                drafts = super().propose_draft_token_ids(*args, **kwargs)
            self._clock.end_step()
            return drafts
        except Exception:
            if self.parallel_config.tensor_parallel_size > 1:
                raise
            logger.exception(
                "Drafting failed. Speculation is off until the server is started anew; answers go on, exact, one token per pass."
            )
            self.tree_metrics.add("num_drafting_errors")
            self.tree_metrics.counts["speculation_off"] = 1
            self._stored.clear()
            return [[] for _ in self.input_batch.req_ids]

    def _learn_costs(self, scheduler_output: SchedulerOutput) -> None:
        """Tell the budget what this step's pass and the last step's drafting took."""
        if self.budget is None:
            return
        gap_s, pass_s, draft_s, levels_s = costs.agree([*self._clock.read(), self.drafter.levels_s])
        if not scheduler_output.scheduled_new_reqs:  # else the engine may have waited for them
            self.budget.saw_gap(gap_s)
        if not self._prompt_rows:
            self.budget.saw_pass(pass_s, scheduler_output.total_num_scheduled_tokens)
        if (drafter := self.drafter).num_drafting:
            depth = self._drafting.depth
            self.budget.saw_drafting(draft_s - levels_s, levels_s, drafter.num_drafting, drafter.level_rows, depth)

    def _plan(self, most_draft_tokens: int) -> DraftPlan:
        """What to draft for the next step."""
        for row in self._prompt_rows:  # computed anew from the start, if the head has missed something of it
            self.drafter.forget(self.input_batch.req_ids[row])
        num_decoding = self._num_decoding
        self._drafting, pays = Plan(self.tree_config.depth_limit), None
        if self.budget is not None and num_decoding:
            self._drafting = plan = self.budget.plan(num_decoding)
            pays = partial(self.budget.pays, plan)
        drawn, req_ids = self._requests_to_draft(most_draft_tokens), list(self.input_batch.req_ids)
        return DraftPlan(req_ids, drawn, sorted({*drawn, *self._prompt_rows}), self._drafting.node_floor, pays)

    def _requests_to_draft(self, most_draft_tokens: int) -> dict[int, Request]:
        """Requests that get a tree for the next step, by row, and how large it may be."""
        requests: dict[int, Request] = {}
        most_requests = self.max_num_tokens // self.tree_config.level_width  # a level must fit vLLM's input buffers
        for row, req_id in enumerate(self.input_batch.req_ids):
            if self.discard_request_mask.np[row]:
                continue
            options = self._options[req_id]
            room = self._room(row, most_draft_tokens)
            if options.num_draft_tokens == 0:
                self.tree_metrics.count_decision("switched_off")
            elif room <= 0:
                self.tree_metrics.count_decision("no_room")
            elif len(requests) == most_requests:
                self.tree_metrics.count_decision("buffer_full")
            elif not self._grammars.ready(req_id):
                self.tree_metrics.count_decision("grammar")
            elif self._drafting.depth == 0:
                self.tree_metrics.count_decision("budget")
            elif self.drafter.is_lost(req_id):
                self.tree_metrics.count_decision("left_behind")
            else:
                params = self.requests[req_id].sampling_params
                num_tokens = int(self.input_batch.num_tokens_no_spec[row])
                requests[row] = Request(
                    root_token_id=int(self.input_batch.token_ids_cpu[row, num_tokens - 1]),
                    num_draft_tokens=min(room, options.num_draft_tokens),
                    temperature=0.0 if params.temperature < _GREEDY_BELOW else params.temperature,
                    max_depth=min(options.max_depth, self._drafting.depth),
                    topk=1 if self._grammars.drafts_chain(req_id) else options.topk,
                )
        return requests

    def _room(self, row: int, most_draft_tokens: int) -> int:
        """How many draft tokens a request can use: its last token needs none, and slots end at the model's length."""
        state = self.requests[self.input_batch.req_ids[row]]
        most_tokens = state.sampling_params.max_tokens
        if most_tokens is not None and most_tokens - len(state.output_token_ids) <= 1:
            return 0
        return min(most_draft_tokens, self.max_model_len - int(self.input_batch.num_tokens_no_spec[row]))
