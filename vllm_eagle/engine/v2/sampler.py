"""Sample after all nodes of all trees, then walk: vLLM's V2 sampling parameters and noise, our acceptance.

vLLM's own rejection sampler draws other random numbers than plain decoding does, so every batch with drafts goes through here, and
tokens equal those without speculation. Where parameters depend on what stands before a node (penalties, bad words, custom
processors, thinking budgets), the walk goes depth by depth: by_depth.py.
"""

from collections.abc import Iterator

import numpy as np
import torch
from vllm.config import SpeculativeConfig
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler, _iter_request_chunks, get_max_chunk_logits

from vllm_eagle.engine.v2.by_depth import walk_by_depth
from vllm_eagle.engine.v2.rows import NodeRows, Walked, draw
from vllm_eagle.engine.v2.slots import SlotTrees
from vllm_eagle.ops.walk import walk


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
        dims = sampler.get_logprobs_dims(batch.idx_mapping_np)
        found = [self._walk(part, dims) for part in self._parts(logits, batch, invalid_drafts)]
        walked, logprobs = zip(*found, strict=True)
        self.paths, emitted, lengths = walked[0] if len(walked) == 1 else map(torch.cat, zip(*walked, strict=True))
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            lengths + 1, batch.seq_lens, batch.cu_num_logits, batch.idx_mapping, sampler.req_states.prefill_len.gpu
        )
        width = emitted.shape[1]
        return SamplerOutput(
            sampled_token_ids=emitted,
            logprobs_tensors=LogprobsTensors.cat(logprobs, [width * i for i in range(batch.num_reqs + 1)]) if dims else None,
            num_nans=self._num_nans(logits, batch) if sampler.compute_nans else None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    @staticmethod
    def _num_nans(logits: torch.Tensor, batch: InputBatch) -> torch.Tensor:
        found = get_num_nans(logits)
        return found.new_zeros(batch.num_reqs).index_add_(0, _request_of_row(batch, len(logits)), found)

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
            forbidden = torch.zeros_like(token_ids, dtype=torch.bool)
            forbidden[_request_of_row(batch, len(rows)), batch.expanded_local_pos.long()] = invalid_drafts
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

    def _walk(self, part: NodeRows, dims: tuple[int, int] | None) -> tuple[Walked, LogprobsTensors | None]:
        """`dims`: what vLLM says of the batch's logprobs; None: nobody wants any."""
        wants_processed = dims is not None and self.sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES
        drawn_from: torch.Tensor | None
        if self._depends_on_path[part.slots_np].any():
            walked, drawn_from = walk_by_depth(self.sampler, part, self._max_depth, wants_processed)
        else:
            sampled, processed = draw(
                self.sampler, part.logits, part, part.slot_of_row, part.node_of_row, part.positions, part.input_ids
            )  # fmt: skip
            targets = torch.zeros_like(part.token_ids)
            at = torch.searchsorted(part.first_rows, torch.arange(len(sampled), device=sampled.device), right=True) - 1
            targets[at, part.node_of_row.long()] = sampled
            walked = walk(part.token_ids, part.parents, part.num_nodes, targets, self._max_depth)
            drawn_from = processed[_path_rows(part, walked[0])] if wants_processed else None
        if dims is None:
            return walked, None
        along = part.logits[_path_rows(part, walked[0])] if drawn_from is None else drawn_from
        return walked, self._logprobs(along, part, walked[1], *dims)

    def _logprobs(
        self,
        along: torch.Tensor,  # [num_reqs * (max_depth + 1), vocab], logits along the paths
        part: NodeRows,
        emitted: torch.Tensor,  # [num_reqs, max_depth + 1] int64, then -1: there logprobs are not looked at
        most: int,
        most_token_ids: int,
    ) -> LogprobsTensors:
        return compute_topk_scores(
            along,
            most,
            emitted.flatten().clamp(min=0),
            logprob_token_ids_state=self.sampler.logprob_token_ids_state,
            expanded_idx_mapping=part.slots[:, None].expand_as(emitted).flatten(),
            max_per_req_token_ids=most_token_ids,
            logits_mode=self.sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )


def _path_rows(part: NodeRows, paths: torch.Tensor) -> torch.Tensor:
    """[num_reqs * (max_depth + 1)] int64: the root's row, then those along the path; behind its end the root's again."""
    return (part.first_rows[:, None] + torch.nn.functional.pad(paths.long(), (1, 0))).flatten()


def _request_of_row(batch: InputBatch, num_rows: int) -> torch.Tensor:  # [num_rows] int64
    counts = batch.cu_num_logits.diff().long()
    return torch.arange(batch.num_reqs, device=counts.device).repeat_interleave(counts, output_size=num_rows)
