"""The rows of logits of a batch's nodes, and vLLM's sampler asked for what comes after them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.sampler import Sampler


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


def draw(
    sampler: Sampler,
    logits: torch.Tensor,  # [num_rows, vocab]
    part: NodeRows,
    slot_of_row: torch.Tensor,
    place_of_row: torch.Tensor,
    positions: torch.Tensor,
    input_ids: torch.Tensor,
    last: Any = slice(None),  # of which rows a token is wanted
) -> tuple[torch.Tensor, torch.Tensor]:  # [rows wanted] int64; [rows wanted, vocab], the logits that they were drawn from
    """Tokens that plain decoding would sample after these rows, which vLLM's kernels take for chains, at these places."""
    processed = sampler.apply_sampling_params(
        logits, slot_of_row, part.slots, part.slots_np, positions, input_ids, place_of_row, part.longest_np
    )
    states, processed = sampler.sampling_states, processed[last].contiguous()
    sampled = gumbel_sample(
        processed,
        slot_of_row[last].contiguous(),
        states.temperature.gpu,
        states.seeds.gpu,
        positions[last].contiguous(),
        apply_temperature=False,
        is_drafting=False,
        use_fp64=sampler.use_fp64_gumbel,
    )
    return sampled, processed
