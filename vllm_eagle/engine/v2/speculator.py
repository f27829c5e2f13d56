"""Draft trees in vLLM's V2 runner: its EAGLE speculator with levels in place of a chain.

The first pass of the head is vLLM's own, over all rows of the target's pass: those of the accepted path are moved to the front of
their request before it, where vLLM expects accepted drafts, and rejected rows behind them are overwritten by the next step. Levels,
ranking and the choice of nodes are the algorithm's (vllm_eagle/algorithm/draft.py), in widths that are known before, so nothing is
read back. They read and write tensors that stay where they are, so they can be captured in CUDA graphs (graphs.py).
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.states import SamplingStates
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator

from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.algorithm.draft import Batch, Level, Limits, NoiseAt, grow_pool
from vllm_eagle.attention.levels import DraftLevels
from vllm_eagle.engine.draft_vocab import DraftLogits
from vllm_eagle.engine.filters import Filters
from vllm_eagle.engine.v2.backlog import Backlog
from vllm_eagle.engine.v2.catching_up import catch_up
from vllm_eagle.engine.v2.counting import Counting, Step
from vllm_eagle.engine.v2.drafts import Drafts
from vllm_eagle.engine.v2.graphs import DraftGraphs, Way, ways
from vllm_eagle.engine.v2.noise import coming_noise
from vllm_eagle.engine.v2.slots import SlotTrees
from vllm_eagle.metrics.counters import Decision
from vllm_eagle.ops.rerank import rerank
from vllm_eagle.options.per_request import RequestOptions

_MOST_LEVEL_ROWS = 2048  # 256 requests of 8; where there are more, levels are narrower
_FREE_ROWS = 256  # of a pass, in which weights are read once for all: reasoning, not measurement


class Owner(Protocol):
    """What the speculator asks of its runner."""

    trees: SlotTrees
    counting: Counting
    step: Step
    drafts: Drafts | None
    request_options: list[RequestOptions]  # by slot

    @property
    def states(self) -> SamplingStates:
        """vLLM's sampling parameters, by slot."""

    @property
    def paths(self) -> torch.Tensor:
        """[num_reqs, max_depth] int32, accepted nodes of this step, then zeros."""

    @property
    def token_ids(self) -> torch.Tensor:
        """[num_slots, max_model_len] int32, prompts and what was emitted."""

    def mark(self, stage: str) -> None:
        """A stage of the step begins."""

    def drafted(self, batch: InputBatch, depth: int) -> None:
        """The trees in the slots of the batch, of at most so many levels, are what its requests will verify next."""

    def drafting_failed(self) -> None:
        """Nothing will be drafted any more; called where the exception is handled."""


class TreeSpeculator(EagleSpeculator):
    """vLLM's EAGLE speculator with trees in place of chains."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, config: TreeConfig, owner: Owner):
        super().__init__(vllm_config, device)
        self._config, self._owner = config, owner
        self.logits: DraftLogits  # once the model is loaded
        self.is_off = False  # drafting has failed
        self.is_measuring_target = False  # vLLM's dummy runs include the head; not while the target's cost is measured
        self.backlog: Backlog | None = None  # None: the head sees all tokens at once
        self._may_have_trees = np.ones(self.max_num_reqs, dtype=bool)  # by slot
        # By place in the batch; places of padding hold what was there before.
        self._root_features = torch.zeros(self.max_num_reqs, self.hidden_size, dtype=self.dtype, device=device)
        self._roots, self._context_lens = torch.zeros(2, self.max_num_reqs, dtype=torch.int64, device=device)
        self._asked = torch.ones(self.max_num_reqs, 4, dtype=torch.int64, device=device)  # drafts, depth, children, top-k
        self._top_p = torch.ones(self.max_num_reqs, dtype=torch.float32, device=device)
        self._captured_rows: dict[tuple[int, Way], list[int]] = {}  # of each level, by the padded number of requests
        self.use_acceptance_estimator = False  # vLLM's, for adaptive verification; it takes what was accepted for a chain

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """As vLLM's for the first pass; then levels in the place of its loop over a chain."""
        super().init_cudagraph_manager(cudagraph_mode)
        mode, captured = self.decode_cudagraph_manager.cudagraph_mode, ways(self._config.depth_limit, self._config.coupled)
        self.decode_cudagraph_manager = DraftGraphs(
            self.vllm_config, self.device, mode, captured, self._most_reqs, self._grow_captured
        )

    def sample_draft(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Called by vLLM after the first pass, within its graph, with the head's features [num_reqs, hidden] of the roots."""
        self._root_features[: len(hidden_states)] = hidden_states
        return torch.zeros(len(hidden_states), dtype=torch.int64, device=hidden_states.device)

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        *args: Any,
        num_speculative_tokens: int | None = None,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Draft one tree per request; returns the tokens [num_reqs, num_speculative_tokens] int64 of nodes 1..n, then zeros.

        If it fails, speculation is switched off. Nothing that is emitted depends on drafting, so this is exact. With tensor
        parallelism one rank cannot stop alone, while the others wait for it: the error ends the engine there.
        """
        most_nodes = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens

        def first_pass() -> torch.Tensor:
            return super(TreeSpeculator, self).propose(
                input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled, num_rejected,
                last_sampled, *args, num_speculative_tokens=1, dummy_run=dummy_run, **kwargs,
            )  # fmt: skip

        if dummy_run:
            return self.draft_tokens[: input_batch.num_reqs] if self.is_measuring_target else first_pass()
        if not self.is_off:
            try:
                features = [*(aux_hidden_states or ())] or [last_hidden_states]
                if not most_nodes and self._puts_off(input_batch, features):
                    return self._nothing(input_batch, "budget")
                self._catch_up(input_batch)
                if input_batch.num_draft_tokens:
                    self._put_paths_first(input_batch, [last_hidden_states, *(aux_hidden_states or ())])
                first_pass()
                if most_nodes:
                    context_lens = (input_batch.seq_lens[: input_batch.num_reqs] - num_rejected).long()
                    return self._draft(input_batch, context_lens, last_sampled)
            except Exception:
                if self.vllm_config.parallel_config.tensor_parallel_size > 1:
                    raise
                self.is_off = True
                self._owner.drafting_failed()
        return self._nothing(input_batch, "failed" if self.is_off else "budget")

    def _nothing(self, batch: InputBatch, why: Decision) -> torch.Tensor:
        """What is verified of a slot must be what was drafted for it."""
        if self._may_have_trees[batch.idx_mapping_np].any():
            self._owner.trees.clear(batch.idx_mapping)
            self._may_have_trees[batch.idx_mapping_np] = False
        self._owner.counting.metrics.count_decision(why, batch.num_reqs)
        if why == "budget":  # nothing is scheduled, and vLLM writes -1 over all of it
            return self.draft_tokens[: batch.num_reqs]
        return torch.zeros(batch.num_reqs, self.num_speculative_steps, dtype=torch.int64, device=self.device)

    def _puts_off(self, batch: InputBatch, features: Sequence[torch.Tensor]) -> bool:
        """Whether the head need not see this step's tokens now, which are kept: all requests decode, and none has drafts."""
        if self.backlog is None or batch.num_draft_tokens or batch.has_prefill:
            return False
        return self.backlog.keep(batch.idx_mapping_np, features)

    def _catch_up(self, batch: InputBatch) -> None:
        """Run the head over what it has not seen of a batch's requests."""
        if self.backlog is None:
            return
        waiting = self.backlog.take(batch.idx_mapping_np)
        if waiting is not None:
            catch_up(self, batch, waiting, self._owner.token_ids)
            self._owner.step.num_caught_up = int(waiting.counts.sum())

    @property
    def most_level_rows(self) -> int:
        """Nodes of a level of all trees: it must fit vLLM's input buffers, and the level's logits must fit the memory."""
        return min(self.max_num_tokens, _MOST_LEVEL_ROWS)

    @property
    def _most_reqs(self) -> int:
        """Requests that trees can be drafted for at a time: levels of dynamic ones may be narrower than they would be."""
        return self.most_level_rows // (self._config.level_width if self._config.mode == "static" else 1)

    def _put_paths_first(self, batch: InputBatch, features: list[torch.Tensor]) -> None:
        """Move rows root, path of each request to the front of its rows: tokens, positions and the target's features."""
        paths = self._owner.paths
        first = batch.logits_indices[batch.cu_num_logits[:-1].long()][:, None]
        places = torch.arange(paths.shape[1] + 1, device=paths.device)
        nodes = torch.nn.functional.pad(paths.long(), (1, 0))
        accepted = (nodes > 0) | (places == 0)
        sources = (first + torch.where(accepted, nodes, 0)).flatten()  # the root onto itself where a path has ended
        targets = (first + torch.where(accepted, places, 0)).flatten()
        for rows in (batch.input_ids, batch.positions, *features):
            rows[targets] = rows[sources]

    def _draft(self, batch: InputBatch, context_lens: torch.Tensor, last_sampled: torch.Tensor) -> torch.Tensor:
        """By a graph where one was captured that does not do much more than is planned; else launch by launch."""
        num_reqs, drafts = batch.num_reqs, self._owner.drafts
        if num_reqs > self._most_reqs:
            return self._nothing(batch, "buffer_full")
        # While the plan says nothing, drafts that were scheduled before are still wanted: a level of them.
        depth = self._config.depth_limit if drafts is None else max(1, drafts.depth)
        planned = None if drafts is None or self._config.mode == "static" else drafts.widths
        way = self._put(batch, context_lens, last_sampled, depth)
        level_rows, graph = self._owner.step.level_rows, self.decode_cudagraph_manager.found(num_reqs, way)
        captured = None if graph is None else self._captured_rows[graph.num_reqs, graph.way]
        if captured is not None and self._is_worth_it(captured, num_reqs, planned):
            self._owner.mark("levels")
            self.decode_cudagraph_manager.run_fullgraph(graph)
            level_rows.extend(captured)
        else:
            self._grow(num_reqs, way, level_rows, planned, int(batch.seq_lens_cpu_upper_bound[:num_reqs].max()))
        self._may_have_trees[batch.idx_mapping_np] = True
        self._owner.drafted(batch, depth)
        return self.draft_tokens[:num_reqs]

    @staticmethod
    def _is_worth_it(captured: Sequence[int], num_reqs: int, planned: Sequence[int] | None) -> bool:
        """Whether to replay levels of so many rows, which are as wide as they may be, where narrower ones are planned.

        The trees are as good either way. Few rows take a pass no longer than one; many do, unless nearly as many are planned.
        """
        if planned is None or max(captured, default=0) <= _FREE_ROWS:
            return True
        return sum(captured) <= 2 * num_reqs * sum(planned[: len(captured)])

    def _put(self, batch: InputBatch, context_lens: torch.Tensor, last_sampled: torch.Tensor, depth: int) -> Way:
        """Put into their places what drafting reads of a batch; the rest vLLM has put there for the first pass."""
        slots, num_reqs, states = batch.idx_mapping, batch.num_reqs, self._owner.states
        places, options = batch.idx_mapping_np, [self._owner.request_options[slot] for slot in batch.idx_mapping_np]
        self._roots[:num_reqs] = last_sampled[slots, 0]
        self._context_lens[:num_reqs] = context_lens
        self._context_lens[num_reqs:] = 0
        asked = np.array(
            [
                (min(self.num_speculative_steps, number), min(each.max_depth, depth), each.topk, top_k)
                for each, number, top_k in zip(options, self._most_drafts(places), states.top_k.np[places], strict=True)
            ],
            dtype=np.int64,
        )
        async_tensor_h2d(asked, out=self._asked[:num_reqs])
        is_filtered = bool((asked[:, 3] < self._vocab_size).any() or (states.top_p.np[places] < 1.0).any())
        if is_filtered:
            self._top_p[:num_reqs] = states.top_p.gpu[slots]
        has_noise = self._config.coupled and bool(states.temperature.np[places].any())
        return Way(min(self._config.depth_limit, int(asked[:, 1].max())), has_noise, is_filtered)

    def _most_drafts(self, slots: np.ndarray) -> list[int]:
        """That requests may have."""
        options, backlog = self._owner.request_options, self.backlog
        return [0 if backlog is not None and backlog.is_lost(slot) else options[slot].num_draft_tokens for slot in slots]

    def _grow_captured(self, num_reqs: int, way: Way) -> None:
        """What a graph holds: nothing of it is decided by the host later."""
        rows: list[int] = []
        self._grow(num_reqs, way, rows, None, None)
        self._captured_rows[num_reqs, way] = rows

    def _grow(
        self, num_reqs: int, way: Way, level_rows: list[int], planned: Sequence[int] | None, longest_context: int | None
    ) -> None:
        """Draft a tree for each of the first `num_reqs` places of the batch, some of which may be padding, and keep it.

        `level_rows` gets the rows of each level. `planned` are the widths of levels, None: as wide as they may be.
        `longest_context` is a bound on contexts, None the greatest possible, in a graph. All else is read on the device.
        """
        slots, most_nodes = self.idx_mapping[:num_reqs], self.num_speculative_steps  # a slot of -1 is padding
        budgets, max_depths, topks, top_k = self._asked[:num_reqs].unbind(1)
        batch = Batch(budgets, self.temperature[slots], max_depths, topks, most_nodes, way.depth)
        filters = Filters(top_k, self._top_p[:num_reqs], batch.temperatures) if way.is_filtered else Filters(None, None, None)
        level_pass = self._level_pass(num_reqs, level_rows, longest_context)
        room = self.most_level_rows // num_reqs
        widths = [self._config.children] * self._config.depth_limit if planned is None else planned
        pool = grow_pool(
            batch,
            filters(self.logits(self._root_features[:num_reqs])),
            lambda level: filters(level_pass(level)),
            self._config,
            self._noise(slots.clamp(min=0)) if way.has_noise else None,
            Limits(widths=[min(room, width) for width in widths], fixed_width=True),
            self.logits.token_ids,
        )
        roots = self._roots[:num_reqs]
        trees = rerank(roots, pool.tokens, pool.scores, pool.parents, budgets, most_nodes + 1, self._config.depth_limit)
        self._owner.trees.store(slots, trees)
        falling = trees.scores.where(torch.arange(most_nodes + 1, device=slots.device) < trees.num_nodes[:, None], -torch.inf)
        # Of these vLLM's adaptive verification takes running products: a node's score then is the chance of all before it.
        self.draft_token_confidence_probs[:num_reqs] = falling.diff(dim=1).exp().nan_to_num(0.0)
        self.draft_tokens[:num_reqs] = trees.token_ids[:, 1:]

    def _level_pass(self, num_reqs: int, level_rows: list[int], longest_context: int | None) -> Callable[[Level], torch.Tensor]:
        """What runs the head over a level: logits [num_reqs, width, draft_vocab]."""
        table = self.block_tables.input_block_tables[self._cache_group][:num_reqs]
        is_captured = longest_context is None
        levels = DraftLevels(table, self._context_lens[:num_reqs], self.max_model_len if is_captured else longest_context)
        hidden = self.hidden_states[:num_reqs].clone()[:, None]  # [num_reqs, width, hidden] of the level before
        root_positions = self.input_buffers.positions[:num_reqs].clone()

        def run(level: Level) -> torch.Tensor:
            nonlocal hidden
            levels.start(level)
            width = level.token_ids.shape[1]
            rows = num_reqs * width
            if not level_rows and not is_captured:
                self._owner.mark("levels")
            level_rows.append(rows)
            parents = level.parent_rows[:, :, None].expand(-1, -1, hidden.shape[2])
            # A node beyond the model's length is never scheduled; its position only has to stay inside the rotary table.
            positions = (root_positions[:, None] + level.depth).clamp(max=self.max_model_len - 1)
            self.input_buffers.input_ids[:rows] = level.token_ids.flatten()
            self.input_buffers.positions[:rows] = positions.expand(-1, width).flatten()
            self.hidden_states[:rows] = hidden.gather(1, parents).flatten(0, 1)
            last, fed_back = self.run_head(rows, dict.fromkeys(self.draft_attn_layer_names, levels))
            hidden = fed_back.view(num_reqs, width, -1)
            return self.logits(last).view(num_reqs, width, -1)

        return run

    def run_head(self, rows: int, metadata: dict[str, Any] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Over the first rows of the input buffers: features for logits and features to feed back, [rows, hidden] each."""
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=rows,
            slot_mapping={},  # keys and values of nodes are scratch: none is written to the cache
            batch_descriptor=BatchDescriptor(num_tokens=rows),
        ):
            found = self.model(
                input_ids=self.input_buffers.input_ids[:rows],
                positions=self.input_buffers.positions[:rows],
                hidden_states=self.hidden_states[:rows],
                inputs_embeds=None,
            )
        last, fed_back = found if isinstance(found, tuple) else (found, found)
        return last[:rows], fed_back[:rows]

    @property
    def _cache_group(self) -> int:
        groups = self.kv_cache_config.kv_cache_groups
        return next(i for i, group in enumerate(groups) if set(group.layer_names) & self.draft_attn_layer_names)

    @property
    def _vocab_size(self) -> int:
        return self.vllm_config.model_config.get_vocab_size()

    def _noise(self, slots: torch.Tensor) -> NoiseAt:
        positions = self.sample_src_positions[: len(slots)]  # of the row after which the first drafts stand

        def noise_at(depth: int) -> torch.Tensor:
            return coming_noise(
                self.seeds, self.temperature, slots, positions + depth - 1, self.logits.token_ids, self._vocab_size,
                self.use_fp64_gumbel,
            )  # fmt: skip

        return noise_at
