import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.algorithm import reference
from vllm_eagle.algorithm.tree import DraftTree, inner_nodes, node_ancestors, node_depths


@st.composite
def parent_lists(draw: st.DrawFn, max_nodes: int = 24) -> list[int]:
    count = draw(st.integers(1, max_nodes))
    return [0] + [draw(st.integers(0, node - 1)) for node in range(1, count)]


def tree_of(parents: list[int]) -> DraftTree:
    """A tree whose siblings hold distinct tokens."""
    return DraftTree(np.arange(len(parents)), np.array(parents), np.zeros(len(parents), dtype=np.float32))


@given(parent_lists())
def test_depths_and_ancestors_equal_the_recursive_definition(parents: list[int]) -> None:
    tree = tree_of(parents)
    nodes = range(len(parents))
    assert tree.depths.tolist() == [reference.depth_of(parents, n) for n in nodes]
    assert tree.ancestors.tolist() == [[reference.is_ancestor(parents, n, above) for above in nodes] for n in nodes]


@given(st.lists(parent_lists(), min_size=1, max_size=5))
def test_batched_depths_and_ancestors_equal_those_of_single_trees(batch: list[list[int]]) -> None:
    widest = max(map(len, batch))
    padded = np.array([parents + [0] * (widest - len(parents)) for parents in batch])
    for i, parents in enumerate(batch):
        count = len(parents)
        assert (node_depths(padded)[i, :count] == tree_of(parents).depths).all()
        assert (node_ancestors(padded)[i, :count, :count] == tree_of(parents).ancestors).all()


@given(st.lists(parent_lists(), min_size=1, max_size=4))
def test_inner_nodes_are_those_with_children(batch: list[list[int]]) -> None:
    expected = [0] * 24
    for parents in batch:
        for node in set(parents[1:]) - {0}:
            expected[reference.depth_of(parents, node) - 1] += 1
    widest = max(map(len, batch)) + 2
    padded = np.array([parents + [0] * (widest - len(parents)) for parents in batch])
    found = inner_nodes(padded, node_depths(padded), np.array([len(parents) for parents in batch]), 24)
    assert found.tolist() == expected


@given(parent_lists(), st.data())
def test_every_prefix_is_a_tree(parents: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(parents)))
    prefix = tree_of(parents).prefix(count)
    assert prefix.num_nodes == count
    assert prefix.parents.tolist() == parents[:count]


@given(parent_lists())
def test_path_leads_from_the_root_to_the_node(parents: list[int]) -> None:
    tree = tree_of(parents)
    for node in range(tree.num_nodes):
        path = tree.path(node)
        assert path[0] == 0
        assert path[-1] == node
        assert all(parents[below] == above for above, below in itertools.pairwise(path))


@given(parent_lists())
def test_a_chain_is_known_by_its_ancestors(parents: list[int]) -> None:
    """Only in a chain does every node see all nodes before it."""
    tree = tree_of(parents)
    assert tree.is_chain == bool(tree.ancestors[np.tril_indices(tree.num_nodes)].all())


def test_child_finds_the_sibling_with_the_token() -> None:
    tree = DraftTree(np.array([9, 5, 6, 5]), np.array([0, 0, 0, 1]), np.zeros(4, dtype=np.float32))
    assert tree.child(0, 5) == 1
    assert tree.child(0, 6) == 2
    assert tree.child(1, 5) == 3
    assert tree.child(2, 5) is None
    assert tree.child(0, 9) is None  # the root is no child of itself


def test_draw_shows_branches_probabilities_and_the_accepted_path() -> None:
    tree = DraftTree(np.array([0, 1, 2, 3]), np.array([0, 0, 0, 1]), np.log(np.array([1, 0.5, 0.25, 0.1], dtype=np.float32)))
    assert tree.draw("abcd".__getitem__, accepted=[0, 1]).splitlines() == [
        "* a",
        "* ├─ b  0.50",
        "  │  └─ d  0.10",
        "  └─ c  0.25",
    ]


@pytest.mark.parametrize("parents", [[0, 1], [0, 0, 3, 0], [1, 0], [0, -1]])
def test_a_child_before_its_parent_is_refused(parents: list[int]) -> None:
    with pytest.raises(ValueError, match="parents must come before"):
        tree_of(parents)


def test_a_tree_without_root_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a root"):
        DraftTree.chain([])
