"""Sample after all nodes of all trees, then walk: vLLM's V2 sampling parameters and noise, our acceptance.

vLLM's own rejection sampler draws other random numbers than plain decoding does, so every batch with drafts goes through here, and
tokens equal those without speculation. Where parameters depend on what stands before a node (penalties, bad words, custom
processors, thinking budgets), the walk goes depth by depth: by_depth.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import SpeculativeConfig
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler, _iter_request_chunks, get_max_chunk_logits

from vllm_eagle.engine.v2.slots import SlotTrees
from vllm_eagle.ops.walk import walk


@dataclass(slots=True, eq=False)
class NodeRows:
    """Requests of a batch, and the rows of logits of their nodes: those of a request side by side, the root's first."""

    logits: torch.Tensor  # [num_rows, vocab]
    slots: torch.Tensor  # [num_reqs] int64
    slots_np: np.ndarray
    slot_of_row: torch.Tensor  # [num_rows] int64
    node_of_row: torch.Tensor  # [num_rows] int32
    positions: torch.Tensor  # [num_rows] int64, of the rows' tokens: by depth
    input_ids: torch.Tensor  # [num_rows] int32, the rows' tokens
    first_rows: torch.Tensor  # [num_reqs] int64
    longest_np: np.ndarray  # [num_reqs], bounds on the requests' lengths
    token_ids: torch.Tensor  # [num_reqs, max_nodes] int64
    parents: torch.Tensor  # [num_reqs, max_nodes] int64
    num_nodes: torch.Tensor  # [num_reqs] int64


Walked = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # as ops/walk.py: paths, emitted tokens, lengths


class TreeSampler(RejectionSampler):
    """In place of vLLM's rejection sampler.

    Attributes:
        paths: [num_reqs, max_depth] int32, accepted nodes of the last batch with drafts, root left out, then zeros.
        num_nodes: [num_reqs] int64, nodes of its trees that were scored, root included.
    """

    def __init__(
        self,
        sampler: Sampler,
        spec_config: SpeculativeConfig,
        device: torch.device,
        trees: SlotTrees,
        max_depth: int,
        depends_on_path: np.ndarray,  # [num_slots] bool, on the host: which requests have such parameters
    ):
        super().__init__(sampler, spec_config, device)
        self._trees, self._max_depth, self._depends_on_path = trees, max_depth, depends_on_path
        self.paths = torch.zeros(0, max_depth, dtype=torch.int32, device=device)
        self.num_nodes = torch.zeros(0, dtype=torch.int64, device=device)

    def __call__(
        self,
        logits: torch.Tensor,  # [num_logits, vocab]
        input_batch: InputBatch,
        draft_logits: torch.Tensor | None = None,
        invalid_drafts: torch.Tensor | None = None,  # [num_logits] bool, nodes that a grammar's bitmasks do not reach
    ) -> SamplerOutput:
        """Tokens [num_reqs, max_depth + 1] int64, padded with -1."""
        batch, sampler = input_batch, self.sampler
        walked = [self._walk(part) for part in self._parts(logits, batch, invalid_drafts)]
        self.paths, emitted, lengths = walked[0] if len(walked) == 1 else map(torch.cat, zip(*walked, strict=True))
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            lengths + 1, batch.seq_lens, batch.cu_num_logits, batch.idx_mapping, sampler.req_states.prefill_len.gpu
        )
        logprobs = None
        num_logprobs = sampler.sampling_states.max_num_logprobs(batch.idx_mapping_np)
        if num_logprobs != NO_LOGPROBS:
            # vLLM takes a request's i-th row for that of its i-th token.
            rows = self._path_first(batch, logits.shape[0])
            logprobs = self._get_logprobs_tensors(
                emitted, num_sampled, logits[rows], batch.cu_num_logits, batch.cu_num_logits_np, num_logprobs
            )
        return SamplerOutput(
            sampled_token_ids=emitted,
            logprobs_tensors=logprobs,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _parts(self, logits: torch.Tensor, batch: InputBatch, invalid_drafts: torch.Tensor | None) -> Iterator[NodeRows]:
        """The batch, in as many parts as vLLM would cut it into so that logits in float32 fit its bound."""
        counts = batch.cu_num_logits.diff().long()
        slots = batch.idx_mapping
        root_positions = batch.seq_lens[: batch.num_reqs] - counts
        # In a step that starts inside the prompt, drafts are paddings of vLLM's.
        drafted = root_positions >= self.sampler.req_states.prefill_len.gpu[slots]
        self.num_nodes = num_nodes = torch.where(drafted, torch.minimum(self._trees.num_nodes[slots], counts), 1)
        token_ids, parents = self._trees.token_ids[slots], self._trees.parents[slots]
        rows, first_rows = batch.logits_indices, batch.cu_num_logits[:-1].long()
        if invalid_drafts is not None:
            at = torch.arange(batch.num_reqs, device=logits.device).repeat_interleave(counts, output_size=len(rows))
            forbidden = torch.zeros_like(token_ids, dtype=torch.bool)
            forbidden[at, batch.expanded_local_pos.long()] = invalid_drafts
            token_ids = token_ids.masked_fill(forbidden, -1)
        most = get_max_chunk_logits(logits.shape[1])
        chunks = [(0, batch.num_reqs)] if len(logits) <= most else _iter_request_chunks(batch.cu_num_logits_np, most)
        for start, end in chunks:
            low, high = (int(batch.cu_num_logits_np[i]) for i in (start, end)) if len(logits) > most else (0, len(logits))
            part, mine = slice(low, high), slice(start, end)
            yield NodeRows(
                logits=logits[part],
                slots=slots[mine],
                slots_np=batch.idx_mapping_np[mine],
                slot_of_row=batch.expanded_idx_mapping[part],
                node_of_row=batch.expanded_local_pos[part],
                positions=batch.positions[rows[part]],
                input_ids=batch.input_ids[rows[part]],
                first_rows=first_rows[mine] - low,
                longest_np=batch.seq_lens_cpu_upper_bound.numpy()[mine],
                token_ids=token_ids[mine],
                parents=parents[mine],
                num_nodes=num_nodes[mine],
            )

    def _walk(self, part: NodeRows) -> Walked:
        if self._depends_on_path[part.slots_np].any():
            from vllm_eagle.engine.v2.by_depth import walk_by_depth

            return walk_by_depth(self.sampler, part, self._max_depth)
        sampled = draw(self.sampler, part.logits, part, part.slot_of_row, part.node_of_row, part.positions, part.input_ids)
        targets = torch.zeros_like(part.token_ids)
        at = torch.searchsorted(part.first_rows, torch.arange(len(sampled), device=sampled.device), right=True) - 1
        targets[at, part.node_of_row.long()] = sampled
        return walk(part.token_ids, part.parents, part.num_nodes, targets, self._max_depth)

    def _path_first(self, batch: InputBatch, num_rows: int) -> torch.Tensor:
        """[num_rows] int64: rows of each request, those of its path before all others."""
        order = torch.arange(num_rows, device=self.paths.device)
        first = batch.cu_num_logits[:-1].long()
        for depth in range(1, self.paths.shape[1] + 1):
            node = self.paths[:, depth - 1].long()
            # Where the path has ended: the root's row onto itself.
            order[first + torch.where(node > 0, depth, 0)] = first + node
        return order


def draw(
    sampler: Sampler,
    logits: torch.Tensor,  # [num_rows, vocab]
    part: NodeRows,
    slot_of_row: torch.Tensor,
    place_of_row: torch.Tensor,
    positions: torch.Tensor,
    input_ids: torch.Tensor,
    last: Any = slice(None),  # of which rows a token is wanted
) -> torch.Tensor:  # [rows wanted] int64
    """Tokens that plain decoding would sample after these rows, which vLLM's kernels take for chains, at these places."""
    processed = sampler.apply_sampling_params(
        logits, slot_of_row, part.slots, part.slots_np, positions, input_ids, place_of_row, part.longest_np
    )
    states = sampler.sampling_states
    return gumbel_sample(
        processed[last].contiguous(),
        slot_of_row[last].contiguous(),
        states.temperature.gpu,
        states.seeds.gpu,
        positions[last].contiguous(),
        apply_temperature=False,
        is_drafting=False,
        use_fp64=sampler.use_fp64_gumbel,
    )
