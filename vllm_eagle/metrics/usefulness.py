"""Notices, once, that a head is no help: everything works, and next to nothing that it drafts is accepted."""

FIRST_NODES = 4096
LEAST_TAU = 1.05


class Usefulness:
    """Counts verifications until it can tell."""

    def __init__(self) -> None:
        self._nodes = self._trees = self._accepted = 0

    def add(self, num_nodes: int, num_accepted: int) -> float | None:
        """Add a verification of a tree with `num_nodes` nodes, root left out.

        Returns:
            Tau, once, if it is too low after the first nodes; else None.
        """
        if self._nodes >= FIRST_NODES:
            return None
        self._nodes += num_nodes
        self._trees += 1
        self._accepted += num_accepted
        tau = 1 + self._accepted / self._trees
        return tau if self._nodes >= FIRST_NODES and tau < LEAST_TAU else None


def advice(head: str, target: str, tau: float) -> str:
    """What to tell the user about a head that is no help."""
    return (
        f"The head is no help: tau {tau:.2f} over the first {FIRST_NODES} drafted nodes. Usual causes: it was trained for another "
        "target or another version of it, on other target layers, on other texts or languages, or too little. See: "
        f"vllm-eagle inspect {head} --target {target}"
    )
