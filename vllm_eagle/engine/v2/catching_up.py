"""The head's passes over tokens that it has not seen yet (backlog.py), before it is run over those of a step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_eagle.engine.v2.backlog import Waiting


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Consecutive tokens of some requests."""

    places: np.ndarray  # [num_reqs] int64, in the batch
    before: np.ndarray  # [num_reqs] int64, of the tokens that wait, those that were in earlier pieces
    counts: np.ndarray  # [num_reqs] int64
    rows: np.ndarray  # [num_tokens] int64, of `Waiting.features`


def pieces(counts: np.ndarray, most_tokens: int) -> Iterator[_Piece]:
    """Cut tokens, `counts` [num_reqs] of each request, into passes of at most so many, each request's in its order."""
    length = max(1, most_tokens // np.count_nonzero(counts))
    first = counts.cumsum() - counts
    for before in range(0, int(counts.max()), length):
        number = (counts - before).clip(0, length)
        places = np.flatnonzero(number)
        rows = [np.arange(number[i]) + first[i] + before for i in places]
        yield _Piece(places, np.full(len(places), before), number[places], np.concatenate(rows))


@torch.inference_mode()
def catch_up(speculator: Any, batch: InputBatch, waiting: Waiting, token_ids: torch.Tensor) -> None:
    """Run the head over what waits of a batch's requests. They precede what the batch's rows are; nothing is read back.

    `speculator`: a TreeSpeculator; its buffers of input ids, positions and features are written. `token_ids`
    [num_slots, max_model_len] int32, of all tokens.
    """
    device, computed = speculator.device, batch.seq_lens[: batch.num_reqs] - batch.query_start_loc[: batch.num_reqs + 1].diff()
    starts = computed.long() - async_tensor_h2d(waiting.counts, device=device)
    for piece in pieces(waiting.counts, speculator.max_num_tokens):
        number, ends = len(piece.rows), np.concatenate([[0], piece.counts.cumsum()])
        places, before = (async_tensor_h2d(each, device=device) for each in (piece.places, piece.before))
        request = async_tensor_h2d(np.arange(len(piece.places)).repeat(piece.counts), device=device)
        within = async_tensor_h2d(np.arange(number) - ends[:-1].repeat(piece.counts), device=device)
        first, slots = starts[places] + before, batch.idx_mapping[places]
        positions = first[request] + within
        features = waiting.features[async_tensor_h2d(piece.rows, device=device)]
        if features.shape[1] != speculator.hidden_size:  # of several layers
            features = speculator.model.combine_hidden_states(features)
        speculator.input_buffers.input_ids[:number] = token_ids[slots.long()[request], positions + 1]
        speculator.input_buffers.positions[:number] = positions
        speculator.hidden_states[:number] = features
        _run(speculator, batch, piece, ends, slots, places, positions, first)


def _run(
    speculator: Any,
    batch: InputBatch,
    piece: _Piece,
    ends: np.ndarray,  # [num_reqs + 1]
    slots: torch.Tensor,  # [num_reqs] int32
    places: torch.Tensor,  # [num_reqs] int64
    positions: torch.Tensor,  # [num_tokens] int64
    first: torch.Tensor,  # [num_reqs] int64, position of each request's first token
) -> None:
    number, num_reqs, tables = len(positions), len(slots), speculator.block_tables
    starts = torch.from_numpy(ends.astype(np.int32))
    query_start_loc = async_tensor_h2d(starts, device=speculator.device)
    longest = batch.seq_lens_cpu_upper_bound[torch.from_numpy(piece.places)]
    # The batch's own are still wanted. As wide as those: the kernel is compiled for that.
    slot_mappings = tables.compute_slot_mappings(
        slots, query_start_loc, positions, number, out=torch.empty_like(tables.slot_mappings)
    )
    metadata = build_attn_metadata(
        attn_groups=speculator.attn_groups,
        num_reqs=num_reqs,
        num_tokens=number,
        query_start_loc_gpu=query_start_loc,
        query_start_loc_cpu=starts,
        max_query_len=int(piece.counts.max()),
        seq_lens=(first + async_tensor_h2d(piece.counts, device=speculator.device)).int(),
        max_seq_len=int(longest.max()),
        block_tables=[table[places] for table in tables.input_block_tables],
        slot_mappings=slot_mappings,
        kv_cache_config=speculator.kv_cache_config,
        seq_lens_cpu_upper_bound=longest,
    )
    with set_forward_context(
        metadata,
        speculator.vllm_config,
        num_tokens=number,
        slot_mapping=build_slot_mappings_by_layer(slot_mappings, speculator.kv_cache_config),
        batch_descriptor=BatchDescriptor(num_tokens=number),
    ):
        speculator.model(
            input_ids=speculator.input_buffers.input_ids[:number],
            positions=speculator.input_buffers.positions[:number],
            hidden_states=speculator.hidden_states[:number],
            inputs_embeds=None,
        )
