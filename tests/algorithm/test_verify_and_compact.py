import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.algorithm import reference
from tests.algorithm.test_tree import parent_lists, tree_of
from vllm_eagle.algorithm import compact
from vllm_eagle.algorithm.verify import lay_out


@given(st.lists(parent_lists(8), min_size=1, max_size=4), st.data())
def test_layout_gives_rows_and_positions_of_every_node(batch: list[list[int]], data: st.DataObject) -> None:
    contexts = [data.draw(st.integers(0, 50)) for _ in batch]
    gaps = [data.draw(st.integers(0, 3)) for _ in batch]  # rows of other requests in between
    first_rows, row = [], 0
    for parents, gap in zip(batch, gaps, strict=True):
        first_rows.append(row + gap)
        row += gap + len(parents)
    laid = lay_out([tree_of(p) for p in batch], range(len(batch)), first_rows, contexts)
    rows, positions = [], []
    for parents, first, context in zip(batch, first_rows, contexts, strict=True):
        rows += [first + node for node in range(len(parents))]
        positions += [context + reference.depth_of(parents, node) for node in range(len(parents))]
    assert laid.rows.tolist() == rows
    assert laid.positions.tolist() == positions


@given(st.lists(parent_lists(16), min_size=1, max_size=3), st.data())
def test_moves_leave_the_accepted_path_in_order(batch: list[list[int]], data: st.DataObject) -> None:
    contexts = [data.draw(st.integers(0, 5)) for _ in batch]
    paths = [tree_of(p).path(data.draw(st.integers(0, len(p) - 1)))[1:] for p in batch]
    caches = [
        [("context", i) for i in range(c)] + [("node", i) for i in range(len(p))] for c, p in zip(contexts, batch, strict=True)
    ]
    expected = [reference.compacted(*x) for x in zip(caches, contexts, paths, strict=True)]
    index, sources, targets = compact.moves(paths, contexts)
    taken = [caches[i][s] for i, s in zip(index, sources, strict=True)]  # read all, then write
    for i, target, value in zip(index, targets, taken, strict=True):
        caches[i][target] = value
    for cache, wanted in zip(caches, expected, strict=True):
        assert cache[: len(wanted)] == wanted


def test_a_path_along_the_first_nodes_needs_no_moves() -> None:
    assert all(len(column) == 0 for column in compact.moves([[1, 2, 3], []], [10, 20]))


def test_slots_follow_the_block_table() -> None:
    table = np.array([[7, 3], [2, 9]], dtype=np.int32)
    assert compact.slots(table, np.array([0, 0, 1]), np.array([0, 5, 6]), 4).tolist() == [28, 13, 38]
