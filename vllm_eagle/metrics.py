"""Counters of tree decoding, from which acceptance length and acceptance rates follow."""

from dataclasses import dataclass, field

from vllm_eagle.accept import Walk


@dataclass(slots=True)
class TreeMetrics:
    """Counts since start; a "verification" is one tree of one request in one target pass."""

    num_passes: int = 0  # target passes, whatever they held
    num_verifications: int = 0
    num_drafted: int = 0  # nodes grown, roots left out
    num_verified: int = 0  # nodes that the scheduler kept and the target scored
    num_accepted: int = 0
    num_moved: int = 0  # tokens whose keys and values were compacted
    accepted_at_depth: list[int] = field(default_factory=list)  # [depth - 1] verifications that accepted a node there

    def count(self, num_nodes: int, num_accepted: int) -> None:
        """Add one verification of a tree with `num_nodes` nodes (root left out)."""
        self.num_verifications += 1
        self.num_verified += num_nodes
        self.num_accepted += num_accepted
        self.accepted_at_depth += [0] * (num_accepted - len(self.accepted_at_depth))
        for depth in range(num_accepted):
            self.accepted_at_depth[depth] += 1

    @property
    def tau(self) -> float:
        """Acceptance length: mean tokens emitted per verification, bonus token included."""
        return 1 + self.num_accepted / self.num_verifications if self.num_verifications else 1.0

    @property
    def alphas(self) -> list[float]:
        """Acceptance rate per depth, of the walks that came that far."""
        reached = [self.num_verifications, *self.accepted_at_depth]
        return [accepted / before for before, accepted in zip(reached, self.accepted_at_depth, strict=False) if before]

    def reset(self) -> None:
        """Set all counts to zero."""
        self.__init__()  # type: ignore[misc]

    def as_dict(self) -> dict[str, object]:
        """Counts and rates, for JSON."""
        counts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return counts | {"tau": self.tau, "alphas": self.alphas}


@dataclass(slots=True)
class TreeTrace:
    """The trees and accepted paths of the next steps, for a look at them."""

    num_steps: int = 0  # still to be recorded
    records: list[dict[str, object]] = field(default_factory=list)

    def record(self, req_id: str, walk: Walk) -> None:
        """Keep one verification, if recording."""
        if self.num_steps > 0:
            tree = walk.tree
            self.records.append(
                {
                    "req_id": req_id,
                    "token_ids": tree.token_ids.tolist(),
                    "parents": tree.parents.tolist(),
                    "scores": tree.scores.tolist(),
                    "path": list(walk.path),
                    "emitted": list(walk.token_ids),
                }
            )

    def end_step(self) -> None:
        """Count one step down."""
        self.num_steps = max(0, self.num_steps - 1)
