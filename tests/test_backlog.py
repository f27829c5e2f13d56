"""Features wait until the head sees them: none twice, none out of order, and no more than there is room for."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_eagle.engine.backlog import Backlog, Piece, batches, join


def piece(start: int, count: int) -> Piece:
    tokens = torch.arange(start, start + count)
    return Piece(start, tokens, tokens[:, None].float())


def test_pieces_come_back_in_order_and_once() -> None:
    backlog = Backlog(100)
    for start, count in ((3, 2), (5, 1), (6, 4)):
        backlog.add("a", piece(start, count))
    backlog.add("b", piece(0, 3))
    assert backlog.num_tokens == 10
    joined = join(backlog.take("a"))
    assert joined.start == 3
    assert joined.token_ids.tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert joined.features[:, 0].tolist() == joined.token_ids.tolist()
    assert backlog.take("a") == []
    assert backlog.num_tokens == 3


def test_a_request_without_room_is_lost_until_it_starts_anew() -> None:
    backlog = Backlog(5)
    backlog.add("a", piece(0, 4))
    backlog.add("b", piece(0, 2))
    assert backlog.is_lost("b")
    assert not backlog.is_lost("a")
    backlog.add("b", piece(2, 1))
    assert backlog.take("b") == []
    backlog.add("a", piece(4, 2))
    assert backlog.is_lost("a")
    assert backlog.num_tokens == 0
    backlog.forget("b")
    backlog.add("b", piece(0, 1))
    assert len(backlog.take("b")) == 1


@given(st.lists(st.integers(0, 20), max_size=8), st.integers(1, 9))
def test_batches_hold_everything_once_in_order(counts: list[int], most: int) -> None:
    waiting = [(row, piece(10 * row, count)) for row, count in enumerate(counts)]
    seen: dict[int, list[int]] = {row: [] for row in range(len(counts))}
    for batch in batches(waiting, most):
        assert 0 < sum(len(p) for _, p in batch) <= most
        rows = [row for row, _ in batch]
        assert len(rows) == len(set(rows))
        for row, p in batch:
            assert p.token_ids[0] == p.start
            seen[row] += p.token_ids.tolist()
    assert seen == {row: p.token_ids.tolist() for row, p in waiting}
