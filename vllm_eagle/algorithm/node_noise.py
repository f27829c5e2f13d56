"""Noise for all nodes of a tree at once: a generator per node, as the request's own would stand at the node's position.

Nodes of one depth see the same noise, at most one of them is on the path, and the request's generator goes on from there: so noise
is used as if tokens had been sampled one after the other. Pure torch.
"""

from collections.abc import Callable, Sequence

import torch

Draw = Callable[[torch.Generator], object]  # what a sampler draws from a request's generator for one position


def node_generators(generator: torch.Generator, depths: Sequence[int], draw: Draw) -> list[torch.Generator]:
    """A generator of its own for each node, by depth from 0; `generator` is left as it was found.

    What was drawn from the one of the last node on a path is what is to be drawn from `generator` along the path.
    """
    found = generator.get_state()
    states = [found]
    try:
        for _ in range(max(depths)):
            draw(generator)
            states.append(generator.get_state())
    finally:
        generator.set_state(found)
    own = []
    for depth in depths:
        own.append(torch.Generator(generator.device))
        own[-1].set_state(states[depth])
    return own
