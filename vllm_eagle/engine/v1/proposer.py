"""Draft trees with vLLM's own EAGLE-1 and EAGLE-3 heads.

The head first runs over the tokens that the target has just committed, with the target's true features, and writes their keys and
values to the head's own layer of the paged cache: that is vLLM's first pass, unchanged. Then it runs level by level over drafted
nodes, whose keys and values stay in scratch. Which nodes to draft is decided in vllm_eagle/algorithm/draft.py.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.models.interfaces import supports_multimodal
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.algorithm.draft import Level, Limits, NoiseAt, Request, grow
from vllm_eagle.algorithm.noise import draws_seeds, gumbel, peek_seeds
from vllm_eagle.algorithm.noise_rows import NoiseRows
from vllm_eagle.algorithm.tree import DraftTree
from vllm_eagle.attention.levels import DraftLevels
from vllm_eagle.engine.draft_vocab import DraftLogits
from vllm_eagle.engine.filters import Filters
from vllm_eagle.engine.layers import blocks_are_given_back
from vllm_eagle.engine.v1.backlog import Backlog
from vllm_eagle.engine.v1.first_pass import FirstPass, passes
from vllm_eagle.engine.v1.grammar import DraftConstraints

BACKLOG_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """What the proposer does in a step."""

    req_ids: list[str]  # by row in the batch
    requests: dict[int, Request]  # those that get a tree, by row
    rows_now: list[int]  # rising; over whose newest tokens the head is run: those, and prompts
    rows_later: list[int]  # over whose it may have to be run later
    limits: Limits


class EagleTreeProposer(EagleProposer):
    """vLLM's EAGLE proposer with trees in place of chains."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        config: TreeConfig,
        # block table, context lengths, bound on them -> metadata of level passes
        levels: Callable[[torch.Tensor, torch.Tensor, int], DraftLevels],
        plan: Callable[[int], "DraftPlan"],  # most draft tokens of a request -> what to draft in this step
        constraints: Callable[[list[int]], DraftConstraints],  # of the requests at these rows in the batch
        keep: Callable[[dict[int, DraftTree]], dict[int, DraftTree]],  # trees by row -> what of them to verify
        paths: Callable[[], Sequence[Sequence[int]]],  # accepted nodes per request of this step, root left out
    ):
        super().__init__(vllm_config, device)
        self._config = config
        self._levels = levels
        self._plan = plan
        self._constraints = constraints
        self._keep = keep
        self._paths = paths
        self.logits: DraftLogits  # once the model is loaded
        self.first_rows = 0  # committed tokens that the head ran over in the last step
        self.level_rows: list[int] = []  # nodes in each level that it ran
        self.levels_s = 0.0  # seconds from the first level on
        self.num_drafting = 0  # requests that it drafted for
        self.of_three_rows = vllm_config.model_config.uses_mrope
        self.puts_off = True  # tokens of requests for which nothing is drafted, until something is
        self.measuring_target = False  # vLLM's dummy runs include the head; not while the target's cost is measured
        feature_bytes = vllm_config.model_config.get_hidden_size() * (3 if self.method == "eagle3" else 1) * self.dtype.itemsize
        self._backlog = Backlog(BACKLOG_BYTES // feature_bytes)

    def load_model(self, target_model: Any) -> None:
        """As vLLM's, which asks Qwen2-VL for its pictures' token by another name than it has for it."""
        config = target_model.config
        if supports_multimodal(target_model) and not hasattr(config, "image_token_index"):
            config.image_token_index = config.image_token_id
        super().load_model(target_model)

    def initialize_attn_backend(self, kv_cache_config: KVCacheConfig, *args: Any) -> None:
        """As vLLM's. What was put off would be written to blocks that others may have by then, if the head lets go of any."""
        super().initialize_attn_backend(kv_cache_config, *args)
        self.puts_off = not blocks_are_given_back(kv_cache_config, self._draft_attn_layer_names)

    def prepare_inputs(
        self,
        common_attn_metadata: CommonAttentionMetadata,
        sampled_token_ids: list[list[int]],
        num_draft_tokens: list[int],
    ) -> tuple[CommonAttentionMetadata, torch.Tensor]:
        """As vLLM's, but the rows handed to the head are those of the accepted path instead of the first ones.

        Slots stay the contiguous ones that vLLM computes: the path's target keys and values were compacted to them.
        """
        metadata, _ = super().prepare_inputs(common_attn_metadata, sampled_token_ids, num_draft_tokens)
        # vLLM lets both point to the same memory on CPU, and later adds to each.
        metadata.seq_lens = metadata.seq_lens.clone()
        starts = common_attn_metadata.query_start_loc_cpu.tolist()
        rows: list[int] = []
        per_request = zip(self._paths(), num_draft_tokens, starts, starts[1:], strict=False)
        for path, num_drafts, start, end in per_request:
            root = end - 1 - num_drafts
            rows += [*range(start, root + 1), *(root + node for node in path)]
        assert len(rows) == metadata.num_actual_tokens
        return metadata, async_tensor_h2d(rows, device=self.device)

    def prepare_next_token_ids_cpu(
        self,
        sampled_token_ids: list[list[int]],
        requests: dict[str, CachedRequestState],
        gpu_input_batch: InputBatch,
        num_scheduled_tokens: dict[str, int],
    ) -> torch.Tensor:
        """As vLLM's, but the device is not waited for: the token after the last committed one of each request, [num_reqs] int32."""
        next_token_ids = []
        for req_id, token_ids in zip(gpu_input_batch.req_ids, sampled_token_ids, strict=False):
            if token_ids:
                next_token_ids.append(token_ids[-1])
            else:  # the prompt goes on
                state = requests[req_id]
                next_token_ids.append(state.get_token_id(state.num_computed_tokens + num_scheduled_tokens[req_id]))
        return async_tensor_h2d(next_token_ids, device=self.device, dtype=torch.int32)

    @torch.inference_mode()
    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,  # [num_tokens]
        target_positions: torch.Tensor,  # [num_tokens], with M-RoPE [3, num_tokens]
        target_hidden_states: torch.Tensor,  # [num_tokens, hidden], EAGLE-3: [num_tokens, num_aux * hidden]
        next_token_ids: torch.Tensor,  # [num_reqs]
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs: tuple[list[torch.Tensor], torch.Tensor] | None = None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        slot_mappings: dict[str, torch.Tensor] | list[dict[str, torch.Tensor]] | None = None,
    ) -> list[list[int]]:
        """Draft one tree per request; returns the tokens of nodes 1..n of each, empty for requests that cannot draft."""
        whole = FirstPass(target_token_ids, next_token_ids, target_positions, target_hidden_states, common_attn_metadata)
        drafts: list[list[int]] = [[] for _ in range(common_attn_metadata.num_reqs)]
        self.first_rows, self.level_rows, self.levels_s, self.num_drafting = 0, [], 0.0, 0
        step = self._plan(num_speculative_tokens)
        for each in passes(
            whole, step.req_ids, step.rows_now, step.rows_later, self._backlog, self.block_size, self.max_num_tokens
        ):
            last_hidden, hidden, last_rows = self._first_pass(each)
        self.num_drafting = len(step.requests)
        if step.requests:
            place = {row: i for i, row in enumerate(step.rows_now)}
            rows = last_rows[async_tensor_h2d([place[row] for row in step.requests], device=self.device)]
            chosen = async_tensor_h2d(list(step.requests), device=self.device)
            common = common_attn_metadata
            levels = self._levels(common.block_table_tensor[chosen], common.seq_lens[chosen].long(), common.max_seq_len)
            level_pass = _LevelPass(self, levels, hidden[rows], self._positions_of(rows))
            filters = Filters.of(sampling_metadata, chosen)
            constraints = self._constraints(list(step.requests)).over(self.logits.token_ids)
            trees = grow(
                list(step.requests.values()),
                filters(constraints.root(self.logits(last_hidden[rows]))),
                lambda level: filters(constraints.level(level, level_pass(level))),
                self._config,
                self._noise(step.requests, sampling_metadata) if self._config.coupled else None,
                step.limits,
                token_ids=self.logits.token_ids,
            )
            if level_pass.started_s is not None:
                self.levels_s = time.perf_counter() - level_pass.started_s
            for row, tree in self._keep(dict(zip(step.requests, trees, strict=True))).items():
                drafts[row] = tree.draft_token_ids
        return drafts

    def forget(self, req_id: str) -> None:
        """The request has ended, or its tokens are computed anew."""
        self._backlog.forget(req_id)

    def missed(self, req_id: str) -> int:
        """Tokens of the request that the head has to catch up with before it drafts."""
        return self._backlog.waiting(req_id)

    def is_lost(self, req_id: str) -> bool:
        """Whether the head has missed too much of the request to draft for it."""
        return self._backlog.is_lost(req_id)

    def _first_pass(self, inputs: FirstPass) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the head over committed tokens: features for logits, features to feed back, last row of each request."""
        self.first_rows += len(inputs.token_ids)
        features = inputs.features
        if self.method == "eagle3":
            features = self.model.combine_hidden_states(features)
        num_tokens, last_rows, metadata = self.set_inputs_first_pass(
            target_token_ids=inputs.token_ids,
            next_token_ids=inputs.next_token_ids,
            target_positions=inputs.positions,
            target_hidden_states=features,
            token_indices_to_sample=None,
            cad=inputs.metadata,
            num_rejected_tokens_gpu=None,
        )
        _, per_layer_metadata = self.build_per_group_and_layer_attn_metadata(metadata)
        mode, num_input_tokens, across_dp = self._determine_batch_execution_and_padding(num_tokens)
        model_inputs, slot_mapping_size = self.build_model_inputs_first_pass(num_tokens, num_input_tokens, None)
        with set_forward_context(
            per_layer_metadata,
            self.vllm_config,
            num_tokens=num_input_tokens,
            num_tokens_across_dp=across_dp,
            cudagraph_runtime_mode=mode,
            slot_mapping=self._get_slot_mapping(slot_mapping_size, metadata.slot_mapping),
        ):
            last_hidden, hidden = self.run_head(model_inputs)
        return last_hidden, hidden, last_rows

    def _positions_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Of the first pass's rows, [len(rows)]: with M-RoPE the largest of three, from which text goes on behind a picture."""
        return self.mrope_positions[:, rows].amax(0) if self.uses_mrope else self.positions[rows]

    def _set_positions(self, num_tokens: int, positions: torch.Tensor) -> None:
        """As vLLM's, which looks into the target's config anew each time; that takes longer than the copy."""
        if self.uses_mrope:
            self.mrope_positions[:, :num_tokens] = positions
        else:
            self.positions[:num_tokens] = positions[0] if self.of_three_rows else positions

    def run_head(self, model_inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features for logits, and features to feed back; an MTP module makes one of both."""
        made = self.model(**model_inputs)
        return made if self.model_returns_tuple() else (made, made)

    def _noise(self, requests: dict[int, Request], metadata: SamplingMetadata) -> NoiseAt | None:
        """Noise of the coming positions of each request, zero where decoding is greedy; None: it is everywhere."""
        sampled = [i for i, request in enumerate(requests.values()) if request.temperature > 0]
        if not sampled:
            return None
        generators = [metadata.generators[row] for row, request in requests.items() if request.temperature > 0]
        token_ids = self.logits.token_ids
        width = self.vllm_config.model_config.get_vocab_size() if token_ids is None else len(token_ids)
        coming = self._coming_noise(generators, token_ids)
        places = async_tensor_h2d(sampled, device=self.device)

        def noise_at(depth: int) -> torch.Tensor:
            noise = torch.zeros(len(requests), width, device=self.device)
            noise[places] = coming(depth)
            return noise

        return noise_at

    def _coming_noise(self, generators: Sequence[torch.Generator], token_ids: torch.Tensor | None) -> NoiseAt:
        """Noise [len(generators), draft_vocab] that vLLM's sampler will draw: seeds of a hash on CPU, else rows of noise.

        With `use_fp64_gumbel` its rows are in float64, and on CPU, too, it draws rows.
        """
        vocab_size = self.vllm_config.model_config.get_vocab_size()
        if not draws_seeds(self.device, self.use_fp64_gumbel):
            rows = NoiseRows(generators, vocab_size, torch.float64 if self.use_fp64_gumbel else torch.float32)
            return lambda depth: rows.at(depth) if token_ids is None else rows.at(depth)[:, token_ids]
        seeds = torch.stack([peek_seeds(generator, self._config.depth_limit) for generator in generators])
        return lambda depth: gumbel(seeds[:, depth - 1], vocab_size if token_ids is None else token_ids)

    @torch.inference_mode()
    def dummy_run(
        self,
        num_tokens: int,
        use_cudagraphs: bool = True,
        is_graph_capturing: bool = False,
        slot_mappings: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """One pass of the head, as a first pass or a level would be; vLLM's runs one per drafted token."""
        if self.measuring_target:
            return
        nodes, self.num_speculative_tokens = self.num_speculative_tokens, 1
        try:
            super().dummy_run(num_tokens, use_cudagraphs, is_graph_capturing, slot_mappings)
        finally:
            self.num_speculative_tokens = nodes


class _LevelPass:
    """Runs the head over one level after the other; each node takes its token and the feature that its parent gave."""

    def __init__(
        self,
        proposer: EagleTreeProposer,
        levels: DraftLevels,
        root_hidden: torch.Tensor,  # [num_drafting, hidden], what the head made of the root
        root_positions: torch.Tensor,  # [num_drafting]
    ):
        self.started_s: float | None = None
        self._proposer = proposer
        self._positions = root_positions
        self._hidden = root_hidden[:, None]  # [num_drafting, width, hidden] of the previous level
        self._levels = levels

    def __call__(self, level: Level) -> torch.Tensor:
        if self.started_s is None:
            self.started_s = time.perf_counter()
        proposer = self._proposer
        self._levels.start(level)
        num_reqs, width = level.token_ids.shape
        parents = level.parent_rows[:, :, None].expand(-1, -1, self._hidden.shape[2])
        # A node beyond the model's length is never scheduled; its position only has to stay inside the rotary table.
        positions = (self._positions[:, None] + level.depth).clamp(max=proposer.max_model_len - 1)
        rows = num_reqs * width
        proposer.level_rows.append(rows)
        mode, num_input_tokens, across_dp = proposer._determine_batch_execution_and_padding(rows)
        proposer.input_ids[:rows] = level.token_ids.flatten()
        positions = positions.expand(-1, width).flatten()
        # Where the target has three rows of positions vLLM takes the head's from these, all or the first; drafts have them alike.
        proposer._set_positions(rows, positions[None] if proposer.of_three_rows else positions)
        proposer.hidden_states[:rows] = self._hidden.gather(1, parents).flatten(0, 1)
        model_inputs, _ = proposer.build_model_inputs_first_pass(rows, num_input_tokens, None)
        with set_forward_context(
            dict.fromkeys(proposer._draft_attn_layer_names, self._levels),
            proposer.vllm_config,
            num_tokens=num_input_tokens,
            num_tokens_across_dp=across_dp,
            cudagraph_runtime_mode=mode,
            slot_mapping={},  # nothing is written to the paged cache
        ):
            last_hidden, hidden = proposer.run_head(model_inputs)
        self._hidden = hidden[:rows].view(num_reqs, width, -1)
        return proposer.logits(last_hidden[:rows]).view(num_reqs, width, -1)
