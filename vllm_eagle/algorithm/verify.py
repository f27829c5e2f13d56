"""Lay a batch of draft trees out as input of one target pass: rows, positions, ancestors.

vLLM gives a request with n draft tokens n + 1 consecutive rows: the root, then nodes 1..n, and writes their keys and values to
the slots of positions context_len, context_len + 1, ... A node's position is context_len + depth, not its slot.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_eagle.algorithm.tree import DraftTree, IntArray, node_ancestors


@dataclass(frozen=True, slots=True, eq=False)
class TreeBatch:
    """The draft trees of one target pass. Padded to the largest tree; padding nodes hang under the root and see it alone."""

    req_indices: IntArray  # [num_trees] int64, row of the request in the batch
    first_rows: IntArray  # [num_trees] int64, input row of each root
    context_lens: IntArray  # [num_trees] int64, tokens of each request whose keys and values are in the cache
    num_nodes: IntArray  # [num_trees] int64, root included
    depths: IntArray  # [num_trees, max_nodes] int64
    ancestors: npt.NDArray[np.bool_]  # [num_trees, max_nodes, max_nodes]

    @property
    def is_node(self) -> npt.NDArray[np.bool_]:
        """[num_trees, max_nodes], false for padding."""
        return np.arange(self.depths.shape[1]) < self.num_nodes[:, None]

    @property
    def rows(self) -> IntArray:
        """Input row of every node, tree after tree: [sum(num_nodes)] int64."""
        return (self.first_rows[:, None] + np.arange(self.depths.shape[1]))[self.is_node]

    @property
    def positions(self) -> IntArray:
        """Position of every node, tree after tree: [sum(num_nodes)] int64."""
        return (self.context_lens[:, None] + self.depths)[self.is_node]


def lay_out(
    trees: Sequence[DraftTree],
    req_indices: Sequence[int],
    first_rows: Sequence[int],
    context_lens: Sequence[int],
) -> TreeBatch:
    """Stack trees into padded arrays; one entry per tree in each argument."""
    num_nodes = np.array([tree.num_nodes for tree in trees], dtype=np.int64)
    parents = np.zeros((len(trees), num_nodes.max(initial=1)), dtype=np.int64)
    for row, tree in zip(parents, trees, strict=True):
        row[: tree.num_nodes] = tree.parents
    ancestors = node_ancestors(parents)
    return TreeBatch(
        req_indices=np.asarray(req_indices, dtype=np.int64),
        first_rows=np.asarray(first_rows, dtype=np.int64),
        context_lens=np.asarray(context_lens, dtype=np.int64),
        num_nodes=num_nodes,
        depths=ancestors.sum(2) - 1,  # a node is among its ancestors
        ancestors=ancestors,
    )
