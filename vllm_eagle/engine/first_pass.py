"""Whose newest tokens the head is run over in a step, and what it has to catch up with before.

The head must have seen all of a request's tokens before it can draft for it. Prompts it sees at once, since other requests may find
their blocks in the prefix cache. Decoded tokens of requests for which nothing is drafted wait in the backlog.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_eagle.engine.backlog import Backlog, Piece, batches, join


@dataclass(frozen=True, slots=True)
class FirstPass:
    """Inputs of one pass of the head over consecutive tokens of some requests."""

    token_ids: torch.Tensor  # [num_tokens], the target's
    next_token_ids: torch.Tensor  # [num_rows], the token after the last one of each request
    positions: torch.Tensor  # [num_tokens]
    features: torch.Tensor  # [num_tokens, hidden], EAGLE-3: [num_tokens, num_aux * hidden]
    metadata: CommonAttentionMetadata

    def pieces(self, rows: Collection[int], copy: bool) -> dict[int, Piece]:
        """The tokens of some rows. A copy outlives the step, in which the target's buffers are used again."""
        cuts = self.metadata.query_start_loc_cpu
        assert self.metadata.seq_lens_cpu_upper_bound is not None  # exact: what was rejected is known
        starts = (self.metadata.seq_lens_cpu_upper_bound - cuts[1:] + cuts[:-1]).tolist()
        ends = cuts.tolist()
        token_ids, features = (x.clone() if copy else x for x in (self.token_ids, self.features))
        return {row: Piece(starts[row], token_ids[ends[row] : ends[row + 1]], features[ends[row] : ends[row + 1]]) for row in rows}


def divide(whole: FirstPass, req_ids: Sequence[str], now: Sequence[int], backlog: Backlog, block_size: int) -> FirstPass:
    """The pass over the newest tokens of the rows in `now`, which rise; those of the others go to the backlog."""
    if len(now) == len(req_ids):
        return whole
    others = set(range(len(req_ids))).difference(now)
    for row, piece in whole.pieces(others, copy=True).items():
        backlog.add(req_ids[row], piece)
    pieces = whole.pieces(now, copy=False)
    rows = async_tensor_h2d(list(now), device=whole.next_token_ids.device, dtype=torch.long)
    return _gathered(pieces, whole.next_token_ids[rows], whole.metadata, block_size)


def catching_up(
    whole: FirstPass, req_ids: Sequence[str], now: Sequence[int], backlog: Backlog, block_size: int, most_tokens: int
) -> Iterator[FirstPass]:
    """Passes that the head needs first, over what waits of the rows in `now`; their results count for nothing."""
    waiting = {row: join(pieces) for row in now if (pieces := backlog.take(req_ids[row]))}
    if not waiting:
        return
    newest = whole.pieces(waiting, copy=False)
    for batch in batches(list(waiting.items()), most_tokens):
        following = []
        for row, piece in batch:
            after = piece.start + len(piece) - waiting[row].start
            rest = waiting[row].token_ids[after:]
            following.append(rest[0] if len(rest) else newest[row].token_ids[0])
        yield _gathered(dict(batch), torch.stack(following), whole.metadata, block_size)


def _gathered(
    pieces: dict[int, Piece], next_token_ids: torch.Tensor, common: CommonAttentionMetadata, block_size: int
) -> FirstPass:
    """A pass over these pieces, by row in the batch that `common` describes. Indices are worked out on the host and sent over."""
    device = common.block_table_tensor.device
    rows = torch.tensor(list(pieces), dtype=torch.long)
    counts = torch.tensor([len(piece) for piece in pieces.values()], dtype=torch.long)
    starts = torch.tensor([piece.start for piece in pieces.values()], dtype=torch.long)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    row_of_token = async_tensor_h2d(torch.arange(len(rows)).repeat_interleave(counts), device=device)
    positions = async_tensor_h2d(torch.arange(int(ends[-1])) + (starts - ends[:-1]).repeat_interleave(counts), device=device)
    table = common.block_table_tensor[async_tensor_h2d(rows, device=device)]
    blocks = table[row_of_token, positions // block_size]
    query_start_loc = ends.to(torch.int32)
    seq_lens = (starts + counts).to(common.seq_lens.dtype)
    metadata = CommonAttentionMetadata(
        query_start_loc=async_tensor_h2d(query_start_loc, device=device),
        query_start_loc_cpu=query_start_loc,
        seq_lens=async_tensor_h2d(seq_lens, device=device),
        num_reqs=len(rows),
        num_actual_tokens=len(positions),
        max_query_len=int(counts.max()) if len(rows) else 0,
        max_seq_len=int(seq_lens.max()) if len(rows) else 0,
        block_table_tensor=table,
        slot_mapping=blocks.to(common.slot_mapping.dtype) * block_size + positions % block_size,
        causal=True,
    )
    joined = join(list(pieces.values())) if pieces else Piece(0, next_token_ids[:0], next_token_ids[:0])
    return FirstPass(joined.token_ids, next_token_ids, positions, joined.features, metadata)
