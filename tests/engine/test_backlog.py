"""Features wait until the head sees them: none twice, none out of order, and no more than there is room for."""

from itertools import accumulate, pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_eagle.engine.v1.backlog import Backlog, Piece, batches, join


def piece(start: int, count: int) -> Piece:
    tokens = torch.arange(start, start + count)
    return Piece(start, tokens, tokens + 100 * torch.arange(3)[:, None], tokens[:, None].float())  # positions in three rows


def keep(backlog: Backlog, **parts: tuple[int, int]) -> None:
    """Tokens of each request: the position of the first one, and how many."""
    whole = join([piece(start, count) for start, count in parts.values()])
    ends = [*accumulate((count for _, count in parts.values()), initial=0)]
    backlog.keep(
        whole.token_ids,
        whole.positions,
        whole.features,
        {req_id: (start, range(*part)) for (req_id, (start, _)), part in zip(parts.items(), pairwise(ends), strict=True)},
    )


def taken(backlog: Backlog, req_id: str) -> list[int]:
    found = backlog.take(req_id)
    assert found is not None
    assert [(row - 100 * i).tolist() for i, row in enumerate(found.positions)] == [found.token_ids.tolist()] * 3
    assert found.token_ids.tolist() == found.features[:, 0].tolist() == list(range(found.start, found.start + len(found)))
    return found.token_ids.tolist()


def test_tokens_come_back_in_order_and_once() -> None:
    backlog = Backlog(100)
    keep(backlog, a=(3, 2), b=(0, 1))
    keep(backlog, a=(5, 1))
    keep(backlog, b=(1, 2), a=(6, 4))
    assert backlog.waiting("a") == 7
    assert taken(backlog, "a") == [3, 4, 5, 6, 7, 8, 9]
    assert backlog.take("a") is None
    assert backlog.waiting("a") == 0
    keep(backlog, c=(40, 5), a=(20, 2))  # in the places of others
    assert [taken(backlog, req_id) for req_id in "abc"] == [[20, 21], [0, 1, 2], [40, 41, 42, 43, 44]]


def test_a_request_without_room_is_lost_until_it_starts_anew() -> None:
    backlog = Backlog(5)
    keep(backlog, a=(0, 4))
    keep(backlog, b=(0, 2))
    assert backlog.is_lost("b")
    assert not backlog.is_lost("a")
    keep(backlog, b=(2, 1))
    assert backlog.take("b") is None
    keep(backlog, a=(4, 2))
    assert backlog.is_lost("a")
    backlog.forget("b")
    keep(backlog, b=(0, 5))
    assert taken(backlog, "b") == [0, 1, 2, 3, 4]


def test_memory_is_that_of_the_tokens_that_there_is_room_for() -> None:
    """Whatever else a pass holds: a prompt beside a waiting token is not kept alive by it."""
    backlog = Backlog(5)
    for _ in range(3):
        features = torch.zeros(1000, 8)
        backlog.keep(torch.zeros(1000), torch.zeros(1000), features, {"a": (7, range(500, 501))})
    found = backlog.take("a")
    assert found is not None
    assert len(found) == 3
    assert found.features.untyped_storage().nbytes() == 3 * 8 * 4
    assert sum(x.numel() for x in vars(backlog).values() if isinstance(x, torch.Tensor)) == 5 * (8 + 1 + 1)


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
