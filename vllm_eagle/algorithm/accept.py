"""Accept drafted tokens: walk each tree from the root along the tokens that the target samples.

At a node, the target samples the token that plain decoding would emit there: same logits, same noise of that position, same
sampler. If a child carries it, the walk goes on at that child; if none does, it is the bonus token and the walk ends. The emitted
tokens are therefore the target's own whatever was drafted, for greedy decoding and for every sampling parameter; the tree decides
only how many of them one step yields. With children chosen without looking at the target's sample this is also the multi-round
acceptance rule of EAGLE for deterministic candidates: accept a child with the target's probability of it.

Noise of a position is used at most once, because only one node of each depth is ever visited. Slow twin:
tests/algorithm/reference.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vllm_eagle.algorithm.tree import DraftTree


@dataclass(slots=True)
class Walk:
    """One request's way down its tree."""

    tree: DraftTree
    path: list[int] = field(default_factory=list)  # accepted nodes, root left out
    token_ids: list[int] = field(default_factory=list)  # emitted tokens: those of the path, then the bonus token
    done: bool = False

    @property
    def node(self) -> int:
        """The node whose successor is to be sampled."""
        return self.path[-1] if self.path else 0

    @property
    def accepted(self) -> npt.NDArray[np.bool_]:
        """By node, root left out: [num_nodes - 1] bool."""
        found = np.zeros(self.tree.num_nodes, dtype=np.bool_)
        found[self.path] = True
        return found[1:]

    def advance(self, token_id: int) -> None:
        """Emit the token that the target sampled after `node` and descend or end."""
        assert not self.done
        self.token_ids.append(token_id)
        child = self.tree.child(self.node, token_id)
        if child is None:
            self.done = True
        else:
            self.path.append(child)

    def stop(self) -> None:
        """End after the last emitted token, although a child carries it: it counts as the bonus token."""
        if not self.done:
            self.path.pop()
            self.done = True


def accept(tree: DraftTree, target_ids: Sequence[int]) -> Walk:
    """Walk one tree when a token was sampled after every node: target_ids [num_nodes]."""
    walk = Walk(tree)
    while not walk.done:
        walk.advance(int(target_ids[walk.node]))
    return walk
