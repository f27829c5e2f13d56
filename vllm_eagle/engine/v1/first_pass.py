"""Whose newest tokens the head is run over in a step, and what it has to catch up with before.

The head must have seen all of a request's tokens before it can draft for it. Prompts it sees at once, since other requests may find
their blocks in the prefix cache. Decoded tokens of requests for which nothing is drafted wait in the backlog.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_eagle.engine.v1.backlog import Backlog, Piece, batches, join


@dataclass(frozen=True, slots=True)
class FirstPass:
    """Inputs of one pass of the head over consecutive tokens of some requests."""

    token_ids: torch.Tensor  # [num_tokens], the target's
    next_token_ids: torch.Tensor  # [num_rows], the token after the last one of each request
    positions: torch.Tensor  # [num_tokens], with M-RoPE [3, num_tokens]
    features: torch.Tensor  # [num_tokens, hidden], EAGLE-3: [num_tokens, num_aux * hidden]
    metadata: CommonAttentionMetadata

    @property
    def starts(self) -> list[int]:
        """Place of each request's first token in its context."""
        cuts = self.metadata.query_start_loc_cpu
        assert self.metadata.seq_lens_cpu_upper_bound is not None  # exact: what was rejected is known
        starts: list[int] = (self.metadata.seq_lens_cpu_upper_bound - cuts[1:] + cuts[:-1]).tolist()
        return starts

    @property
    def parts(self) -> list[range]:
        """Which of the tokens are each request's."""
        cuts = self.metadata.query_start_loc_cpu.tolist()
        return [range(*ends) for ends in pairwise(cuts)]

    def pieces(self, rows: Iterable[int]) -> dict[int, Piece]:
        """The tokens of some rows."""
        starts, parts = self.starts, self.parts
        found = {}
        for row in rows:
            part = slice(parts[row].start, parts[row].stop)
            found[row] = Piece(starts[row], self.token_ids[part], self.positions[..., part], self.features[part])
        return found


def passes(
    whole: FirstPass,
    req_ids: Sequence[str],
    now: Sequence[int],
    later: Sequence[int],
    backlog: Backlog,
    block_size: int,
    most_tokens: int,
) -> Iterator[FirstPass]:
    """Passes that the head needs now: over the newest tokens of the rows in `now`, which rise, and what waits of them.

    The last pass ends with the newest token of each row in `now`; results of those before it, if there are any, count for nothing.
    Tokens of the rows in `later` go to the backlog; of those in neither the head sees nothing.
    """
    if later:
        starts, parts = whole.starts, whole.parts
        mine = {req_ids[row]: (starts[row], parts[row]) for row in later}
        backlog.keep(whole.token_ids, whole.positions, whole.features, mine)
    waiting = {row: piece for row in now if (piece := backlog.take(req_ids[row])) is not None}
    if not waiting and len(now) == len(req_ids):
        yield whole
        return
    if not now:
        return
    newest = whole.pieces(now)
    if sum(map(len, (*waiting.values(), *newest.values()))) <= most_tokens:
        newest = {row: join([waiting[row], piece]) if row in waiting else piece for row, piece in newest.items()}
    else:
        yield from _catching_up(waiting, newest, whole.metadata, block_size, most_tokens)
    rows = async_tensor_h2d(list(now), device=whole.next_token_ids.device, dtype=torch.long)
    yield _gathered(newest, whole.next_token_ids[rows], whole.metadata, block_size)


def _catching_up(
    waiting: Mapping[int, Piece], newest: Mapping[int, Piece], common: CommonAttentionMetadata, block_size: int, most_tokens: int
) -> Iterator[FirstPass]:
    for batch in batches(list(waiting.items()), most_tokens):
        following = []
        for row, piece in batch:
            rest = waiting[row][piece.start - waiting[row].start + len(piece) :]
            following.append(rest.token_ids[0] if len(rest) else newest[row].token_ids[0])
        yield _gathered(dict(batch), torch.stack(following), common, block_size)


def _gathered(
    pieces: Mapping[int, Piece], next_token_ids: torch.Tensor, common: CommonAttentionMetadata, block_size: int
) -> FirstPass:
    """A pass over these pieces, by row in the batch that `common` describes. Indices are worked out on the host and sent over."""
    device = common.block_table_tensor.device
    rows = torch.tensor(list(pieces), dtype=torch.long)
    counts = torch.tensor([len(piece) for piece in pieces.values()], dtype=torch.long)
    starts = torch.tensor([piece.start for piece in pieces.values()], dtype=torch.long)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    row_of_token = async_tensor_h2d(torch.arange(len(rows)).repeat_interleave(counts), device=device)
    places = async_tensor_h2d(torch.arange(int(ends[-1])) + (starts - ends[:-1]).repeat_interleave(counts), device=device)
    table = common.block_table_tensor[async_tensor_h2d(rows, device=device)]
    blocks = table[row_of_token, places // block_size]
    query_start_loc = ends.to(torch.int32)
    seq_lens = (starts + counts).to(common.seq_lens.dtype)
    metadata = CommonAttentionMetadata(
        query_start_loc=async_tensor_h2d(query_start_loc, device=device),
        query_start_loc_cpu=query_start_loc,
        seq_lens=async_tensor_h2d(seq_lens, device=device),
        num_reqs=len(rows),
        num_actual_tokens=len(places),
        max_query_len=int(counts.max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=table,
        slot_mapping=blocks.to(common.slot_mapping.dtype) * block_size + places % block_size,
        causal=True,
    )
    joined = join(list(pieces.values()))
    return FirstPass(joined.token_ids, next_token_ids, joined.positions, joined.features, metadata)
