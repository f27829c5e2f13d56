"""Fixed tree shapes (EAGLE-1): which child ranks are drafted under which node, the same at every step."""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

RankPath = tuple[int, ...]  # child ranks from the root: (0, 1) is the second best child of the best child

# How often the child of rank r is the accepted one, for `best_static_shape`. A head with these rates accepts 0.7 in a chain.
RANK_ACCEPTANCE = (0.70, 0.12, 0.05, 0.03, 0.02, 0.013, 0.009, 0.007)


@dataclass(frozen=True, slots=True)
class StaticShape:
    """A fixed tree: one rank path per node, sorted by depth and then by rank."""

    paths: tuple[RankPath, ...]

    @classmethod
    def from_paths(cls, paths: Sequence[Sequence[int]]) -> "StaticShape":
        """Check and sort a user's list of rank paths.

        Raises:
            ValueError: a path is no list of ranks, stands twice, or its parent is missing.
        """
        if not isinstance(paths, Sequence) or not paths or isinstance(paths, str):
            raise ValueError(f"static_shape={paths!r} is not possible; give a list of rank paths, e.g. [[0], [1], [0, 0]]")
        checked: set[RankPath] = set()
        for path in paths:
            is_path = isinstance(path, Sequence) and not isinstance(path, str) and len(path) > 0
            if not is_path or any(isinstance(r, bool) or not isinstance(r, int) or r < 0 for r in path):
                raise ValueError(f"static_shape holds {path!r}; every entry must be a list of ranks from 0, e.g. [0, 1]")
            if tuple(path) in checked:
                raise ValueError(f"static_shape holds {list(path)} twice; remove one")
            checked.add(tuple(path))
        for path in checked:
            if len(path) > 1 and path[:-1] not in checked:
                raise ValueError(f"static_shape holds {list(path)} but not its parent {list(path[:-1])}; add the parent")
        return cls(tuple(sorted(checked, key=lambda path: (len(path), path))))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def depth(self) -> int:
        """Depth of the deepest node."""
        return max(map(len, self.paths))

    @property
    def num_ranks(self) -> int:
        """Children that a node must offer at most."""
        return max(max(path) for path in self.paths) + 1

    def level(self, depth: int) -> list[RankPath]:
        """Nodes of one depth; depth 0 is the root alone."""
        return [()] if depth == 0 else [path for path in self.paths if len(path) == depth]

    def inner(self, depth: int) -> list[RankPath]:
        """Nodes of one depth that have children."""
        parents = {path[:-1] for path in self.level(depth + 1)}
        return [path for path in self.level(depth) if path in parents]


@cache
def best_static_shape(num_draft_tokens: int, rank_acceptance: tuple[float, ...] = RANK_ACCEPTANCE) -> StaticShape:
    """The shape with the most expected accepted tokens if rank r of any node is accepted with probability `rank_acceptance[r]`.

    A node's worth is the product of the rates on its path, so taking the worthiest node next is optimal.
    """
    order: Iterator[int] = itertools.count()
    heap: list[tuple[float, int, RankPath]] = []

    def offer(path: RankPath, worth: float) -> None:
        heapq.heappush(heap, (-worth, next(order), path))

    offer((0,), rank_acceptance[0])
    paths: list[RankPath] = []
    while len(paths) < num_draft_tokens:
        negative_worth, _, path = heapq.heappop(heap)
        paths.append(path)
        worth, rank = -negative_worth, path[-1]
        offer((*path, 0), worth * rank_acceptance[0])
        if rank + 1 < len(rank_acceptance):
            offer((*path[:-1], rank + 1), worth * rank_acceptance[rank + 1] / rank_acceptance[rank])
    return StaticShape.from_paths(paths)
