"""A draft tree: the tokens proposed for one request in one step.

Node 0 is the root: the last committed token, whose keys and values the target has not computed yet. Nodes are ordered so that
parents come before children and scores fall, so every prefix of the order is itself a valid tree: vLLM's scheduler may cut the
list of draft tokens short at any point.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class DraftTree:
    """Tokens, parents and scores of one draft tree.

    Raises:
        ValueError: the arrays are not one tree in prefix-valid order.
    """

    token_ids: IntArray  # [num_nodes] int64, node 0 is the root
    parents: IntArray  # [num_nodes] int64, parents[i] < i, the root is its own parent
    scores: npt.NDArray[np.float32]  # [num_nodes], natural log of the estimated acceptance probability; root 0

    def __post_init__(self) -> None:
        num_nodes = len(self.token_ids)
        if num_nodes == 0 or len(self.parents) != num_nodes or len(self.scores) != num_nodes:
            raise ValueError(
                f"a tree needs a root and one parent and score per node, got {num_nodes} tokens, "
                f"{len(self.parents)} parents, {len(self.scores)} scores"
            )
        order = np.arange(num_nodes)
        if self.parents[0] != 0 or (self.parents[1:] >= order[1:]).any() or (self.parents < 0).any():
            raise ValueError(f"parents must come before their children, got parents {self.parents.tolist()}")

    @classmethod
    def root_only(cls, token_id: int) -> "DraftTree":
        """The tree that drafts nothing."""
        return cls.chain([token_id])

    @classmethod
    def chain(cls, token_ids: Sequence[int]) -> "DraftTree":
        """A tree with one child per node; `token_ids[0]` is the root."""
        parents = np.maximum(np.arange(len(token_ids)) - 1, 0)
        return cls(np.asarray(token_ids, dtype=np.int64), parents, np.zeros(len(token_ids), dtype=np.float32))

    @property
    def num_nodes(self) -> int:
        """Nodes with the root."""
        return len(self.token_ids)

    @property
    def is_chain(self) -> bool:
        """Whether every node has one child at most: then slots go by position and causal attention is the tree's own."""
        return self.num_nodes < 3 or bool((self.parents[1:] == np.arange(self.num_nodes - 1)).all())

    @property
    def draft_token_ids(self) -> list[int]:
        """Tokens of nodes 1..n, as vLLM's scheduler wants them."""
        return self.token_ids[1:].tolist()

    @property
    def depths(self) -> IntArray:
        """Edges from the root: [num_nodes] int64."""
        return node_depths(self.parents[None])[0]

    @property
    def ancestors(self) -> npt.NDArray[np.bool_]:
        """[num_nodes, num_nodes] bool, true at [i, j] if j is i or above i."""
        return node_ancestors(self.parents[None])[0]

    def prefix(self, num_nodes: int) -> "DraftTree":
        """The tree of the first `num_nodes` nodes (root included)."""
        if num_nodes >= self.num_nodes:
            return self
        return DraftTree(self.token_ids[:num_nodes], self.parents[:num_nodes], self.scores[:num_nodes])

    def child(self, node: int, token_id: int) -> int | None:
        """The child of `node` that carries `token_id`; siblings hold distinct tokens, so there is at most one."""
        if node + 1 == self.num_nodes:
            return None
        (matches,) = ((self.parents[node + 1 :] == node) & (self.token_ids[node + 1 :] == token_id)).nonzero()
        return int(matches[0]) + node + 1 if len(matches) else None

    def path(self, node: int) -> list[int]:
        """Nodes from the root (included) to `node`."""
        nodes = [node]
        while nodes[-1] != 0:
            nodes.append(int(self.parents[nodes[-1]]))
        return nodes[::-1]

    def draw(self, decode: Callable[[int], str] = str, accepted: Sequence[int] = ()) -> str:
        """The tree as text, one node a line; nodes in `accepted` are marked with `*`."""
        children: dict[int, list[int]] = {}
        for node in range(1, self.num_nodes):
            children.setdefault(int(self.parents[node]), []).append(node)
        lines: list[str] = []

        def visit(node: int, indent: str, branch: str, last: bool) -> None:
            mark = "*" if node in accepted else " "
            probability = f"  {np.exp(self.scores[node]):.2f}" if node else ""
            lines.append(f"{mark} {indent}{branch}{decode(int(self.token_ids[node]))}{probability}")
            below = indent + ("   " if last else "│  ") if branch else indent
            for child in children.get(node, []):
                is_last = child == children[node][-1]
                visit(child, below, "└─ " if is_last else "├─ ", is_last)

        visit(0, "", "", True)
        return "\n".join(lines)


def depths_of(trees: Sequence[DraftTree]) -> list[IntArray]:
    """Depths of the nodes of each tree, root included; cheaper than one by one."""
    parents = np.zeros((len(trees), max(tree.num_nodes for tree in trees)), dtype=np.int64)
    for row, tree in zip(parents, trees, strict=True):
        row[: tree.num_nodes] = tree.parents
    return [depths[: tree.num_nodes] for depths, tree in zip(node_depths(parents), trees, strict=True)]


def inner_nodes(parents: IntArray, depths: IntArray, num_nodes: IntArray, depth_limit: int) -> IntArray:
    """How many nodes of all trees have children, by depth from 1: [depth_limit] int64.

    Parents and depths are [num_trees, max_nodes], of which the first `num_nodes` [num_trees] count.
    """
    is_node = np.arange(parents.shape[1]) < num_nodes[:, None]
    has_children = np.zeros_like(is_node)
    np.put_along_axis(has_children, np.where(is_node, parents, 0), True, axis=1)
    return np.bincount(depths[has_children], minlength=depth_limit + 1)[1 : depth_limit + 1]


def node_depths(parents: IntArray) -> IntArray:
    """Depth of every node of several trees: parents [num_trees, num_nodes] -> [num_trees, num_nodes] int64."""
    first, flat = _flat(parents)
    depths, above = np.zeros_like(flat), np.arange(flat.size)
    while (below_root := above != first).any():
        depths += below_root
        above = flat[above]
    return depths.reshape(parents.shape)


def node_ancestors(parents: IntArray) -> npt.NDArray[np.bool_]:
    """Ancestors of several trees: parents [num_trees, num_nodes] -> [num_trees, num_nodes, num_nodes] bool.

    Climbs from all nodes at once, so the cost is the greatest depth, not the number of nodes.
    """
    num_trees, num_nodes = parents.shape
    first, flat = _flat(parents)
    ancestors = np.zeros((flat.size, num_nodes), dtype=np.bool_)
    nodes = above = np.arange(flat.size)
    while True:
        ancestors[nodes, above - first] = True
        if (above == first).all():
            return ancestors.reshape(num_trees, num_nodes, num_nodes)
        above = flat[above]


def _flat(parents: IntArray) -> tuple[IntArray, IntArray]:
    """Of every node its root and its parent, all trees' nodes numbered on: [num_trees * num_nodes] each."""
    first = (np.arange(len(parents)) * parents.shape[1]).repeat(parents.shape[1])
    return first, parents.ravel() + first
