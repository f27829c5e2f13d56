"""vLLM's V1 model runner with draft trees (cpu_runner.py: what a CPU needs besides). One step:

    _prepare_inputs            lay out the trees that the scheduler scheduled; positions by depth
    _build_attention_metadata  hand the trees to attention
    _sample                    score all nodes, walk (scorer.py)
    _update_states_after_...   compact the accepted paths' keys and values
    take_draft_token_ids       grow the next trees (planning.py: for whom; proposer.py: how), once the tokens are on their way

Everything else is vLLM's. Trees live here, by request id; vLLM's scheduler sees ordinary draft tokens.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.utils.torch_utils import PIN_MEMORY, async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, SamplerOutput
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from vllm_eagle.algorithm.accept import Walk
from vllm_eagle.algorithm.config import CONFIG_KEY, TreeConfig
from vllm_eagle.algorithm.tree import DraftTree
from vllm_eagle.algorithm.verify import TreeBatch, lay_out
from vllm_eagle.attention.interface import check_layers
from vllm_eagle.attention.levels import DraftLevels
from vllm_eagle.budget.budget import Plan
from vllm_eagle.engine.draft_vocab import logits_of
from vllm_eagle.engine.features import listen
from vllm_eagle.engine.head_window import limit_head
from vllm_eagle.engine.layers import target_layers
from vllm_eagle.engine.loaded import language_model_of
from vllm_eagle.engine.v1.clock import StepClock
from vllm_eagle.engine.v1.grammar import TreeGrammars
from vllm_eagle.engine.v1.planning import DraftPlanning
from vllm_eagle.engine.v1.proposer import EagleTreeProposer
from vllm_eagle.engine.v1.scorer import PADDING, EagleTreeScorer
from vllm_eagle.metrics.counters import TreeMetrics, TreeTrace
from vllm_eagle.metrics.usefulness import Usefulness, advice
from vllm_eagle.options.per_request import RequestOptions

_NOTHING_DRAFTED = DraftTree.root_only(PADDING)

logger = init_logger(f"vllm.{__name__}")  # below "vllm", so that vLLM shows it with its own lines


class EagleTreeRunner(DraftPlanning):
    """vLLM's V1 model runner, verifying trees. A mixin: to be put before the runner of a device, which all derive from vLLM's."""

    def init_trees(self, metrics: TreeMetrics) -> None:
        """Replace drafter, scorer and logits processors; the rest of the runner is as vLLM built it."""
        spec = self.speculative_config
        self.tree_config = TreeConfig.from_options(
            spec.num_speculative_tokens, self.vllm_config.additional_config.get(CONFIG_KEY, {})
        )
        self.tree_metrics = metrics
        self.tree_trace = TreeTrace()
        self._stored = {}
        self._scheduled: list[DraftTree] = []  # of this step, by row in the batch
        self._tree_batch: TreeBatch | None = None  # those of them that branch
        self._walks: list[Walk] = []
        self._usefulness = Usefulness()
        self._grammar_output: GrammarOutput | None = None  # of this step: what the scheduler's grammars allow
        self._grammars = TreeGrammars(self.vllm_config)
        self._options = {}
        self._prompt_rows = []
        self._draft: Callable[[], list[list[int]]] | None = None  # what is left to do of this step
        self.budget = None
        self._clock = StepClock(metrics)
        self._drafting = Plan(0)
        self.scorer = EagleTreeScorer(self.sampler)
        self.drafter = EagleTreeProposer(
            self.vllm_config,
            self.device,
            self.tree_config,
            levels=DraftLevels,
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

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; then see that all of the head is there, and ask every attention layer, the head's included, whether it can run
        trees.

        Raises:
            ValueError: something is missing, or a layer cannot; the message says why.
        """
        super().load_model(*args, **kwargs)
        target = language_model_of(self.get_model())
        self.drafter.logits = logits_of(self.drafter.model, target, self.vllm_config, self.tree_config, self.device)
        layers = self.compilation_config.static_forward_context
        check_layers(layers, self.max_model_len)
        limit_head(self.vllm_config, self.tree_config, layers, self.drafter._draft_attn_layer_names)

    def _setup_eagle3_aux_hidden_state_outputs(self) -> None:
        """As vLLM's, which asks the target's class for features; listen to the layers of those that have no answer."""
        model = self.get_model()
        if not self.use_aux_hidden_state_outputs or supports_eagle3(model):
            super()._setup_eagle3_aux_hidden_state_outputs()
            return
        inner = language_model_of(model)
        num_layers = len(inner.model.layers)
        layers = self._get_eagle3_aux_layers_from_config() or (2, num_layers // 2, num_layers - 3)
        if inner is not model:  # Qwen2-VL returns what its language model does
            inner.set_aux_hidden_state_layers(layers)
            return
        listen(model, layers, self.max_num_tokens, self.model_config.get_hidden_size(), self.dtype)

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
        logits_indices, metadata, most_sampled = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        for req_id in self.input_batch.req_ids:
            if req_id not in self._options:
                self._welcome(req_id)
        ends = np.cumsum(num_scheduled_tokens)
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        self._scheduled = [self._scheduled_tree(req_id, scheduled.get(req_id, [])) for req_id in self.input_batch.req_ids]
        num_reqs, num_nodes = self.input_batch.num_reqs, np.array([tree.num_nodes for tree in self._scheduled])
        is_prompt = self.input_batch.num_computed_tokens_cpu[:num_reqs] < self.input_batch.num_prompt_tokens[:num_reqs]
        self._prompt_rows = np.flatnonzero(is_prompt | (num_scheduled_tokens > num_nodes)).tolist()
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
            rows = async_tensor_h2d(self._tree_batch.rows, device=self.device)
            positions = async_tensor_h2d(self._tree_batch.positions, device=self.device, dtype=self.positions.dtype)
            if self.uses_mrope:  # what is decoded moves in all three rows alike
                self.mrope_positions.gpu[:, rows] += positions - self.positions[rows]
            self.positions[rows] = positions
        self._own_noise_streams()
        # Without drafts it says nothing, and vLLM would copy all inputs for the head row by row.
        return logits_indices, metadata if scheduled else None, most_sampled

    def _welcome(self, req_id: str) -> None:
        state = self.requests[req_id]
        try:
            self._options[req_id] = RequestOptions.from_extra_args(state.sampling_params.extra_args)
        except ValueError as error:  # refused before it comes here, where the plugin is loaded
            logger.error("Request %s: %s; it is answered as if it had not asked.", req_id, error)
            self._options[req_id] = RequestOptions()
        self._grammars.start(req_id, state)

    def _scheduled_tree(self, req_id: str, token_ids: list[int]) -> DraftTree:
        """The tree behind the draft tokens that the scheduler scheduled for a request."""
        if not token_ids:
            return _NOTHING_DRAFTED
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
        output = super().sample_tokens(None)
        self._clock.pause()
        return output

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
            if nodes == 1 or row in discarded or walk.tree.token_ids[1] == PADDING:  # such nodes are vLLM's, not the head's
                continue
            self.tree_metrics.count_verification(nodes - 1, len(walk.path), num_reqs)
            self._warn_if_useless(self._usefulness.add(nodes - 1, len(walk.path)))
            self.tree_trace.record(self.input_batch.req_ids[row], walk)
            scores.append(walk.tree.scores[1:])
            accepted.append(walk.accepted)
        if self.budget is not None and scores:
            self.budget.calibration.update(np.concatenate(scores), np.concatenate(accepted))
        self.tree_trace.end_step()

    def _warn_if_useless(self, tau: float | None) -> None:
        if tau is not None and self.parallel_config.rank == 0:
            logger.warning("%s", advice(self.speculative_config.draft_model_config.model, self.model_config.model, tau))

    def _update_states_after_model_execute(self, output_token_ids: torch.Tensor, scheduler_output: SchedulerOutput) -> None:
        super()._update_states_after_model_execute(output_token_ids, scheduler_output)
        if self._tree_batch is not None:
            with self.tree_metrics.timed("compact"):
                self._compact(self._tree_batch)
            self._tree_batch = None

    def _compact(self, batch: TreeBatch) -> None:
        paths = [self._walks[row].path for row in batch.req_indices]
        num_moved = sum(node != depth for path in paths for depth, node in enumerate(path, start=1))
        if num_moved:
            self._move_accepted(batch, paths)
        self.tree_metrics.add("num_moved", num_moved)

    def _move_accepted(self, batch: TreeBatch, paths: list[list[int]]) -> None:
        """Move keys and values of each path's nodes to the slots of their positions, as vllm_eagle/algorithm/compact.py says."""
        raise NotImplementedError

    def _target_layers(self) -> Iterator[tuple[int, list[Attention]]]:
        context = self.compilation_config.static_forward_context
        return target_layers(self.kv_cache_config, context, self.drafter._draft_attn_layer_names)

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        # For requests whose prompt is not complete vLLM rewinds the generator by one draw, which CPU generators cannot do. The
        # scorer drew nothing for them, so there is nothing to rewind, on no device: keep their generators out of sight.
        generators = self.input_batch.generators
        discarded = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs]).tolist()
        hidden = {row: generators.pop(row) for row in discarded if row in generators}
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            generators.update(hidden)

    def propose_draft_token_ids(
        self, scheduler_output: SchedulerOutput, sampled_token_ids: list[list[int]], *args: Any, **kwargs: Any
    ) -> Any:
        """Nothing yet: vLLM asks for drafts when it has sent the step's tokens off, so that nobody who reads waits for drafting."""
        sampled = [token_ids.copy() for token_ids in sampled_token_ids]  # a scheduler in this process cuts them where answers end
        self._draft = partial(self._draft_or_give_up, super().propose_draft_token_ids, scheduler_output, sampled, *args, **kwargs)
        return []

    @torch.inference_mode()
    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Draft, then as vLLM's."""
        if self._draft is not None:
            draft, self._draft = self._draft, None
            self._draft_token_ids = draft()
        return super().take_draft_token_ids()

    def _draft_or_give_up(self, propose: Callable[..., Any], scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Draft; if that fails, speculation is switched off and decoding goes on without it.

        Nothing that is emitted depends on drafting, so this is exact. With tensor parallelism one rank cannot stop alone, while the
        others wait for it: the error ends the engine there, as vLLM's own errors do.
        """
        self._clock.resume()
        if self.tree_metrics.counts["speculation_off"]:
            self.tree_metrics.count_decision("failed", len(self.input_batch.req_ids))
            return [[] for _ in self.input_batch.req_ids]
        try:
            self._learn_costs(scheduler_output)
            with self.tree_metrics.timed("draft"):
                drafts = propose(scheduler_output, *args, **kwargs)
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
            return [[] for _ in self.input_batch.req_ids]
