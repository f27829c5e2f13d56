"""Measure, at start-up, what passes of the target and of the head cost on this machine."""

import time
from collections.abc import Callable

import torch

from vllm_eagle.budget.cost_curve import CostCurve

_ROUNDS = 3
_LONGEST_S = 0.5  # a pass that takes longer is measured once, and is the last one; the curve goes on straight
_FEWEST = 5  # points in any case: up to 16 tokens, a tree for one request


def measure(run: Callable[[int], None], most_tokens: int) -> CostCurve:
    """Seconds of `run(number of tokens)` at powers of two; the fastest of some rounds, since whatever disturbs makes it slower."""
    tokens: list[int] = []
    seconds: list[float] = []
    number = 1
    while number <= most_tokens:
        # The first one allocates. Ranks run passes together, so they stop together.
        rounds = _ROUNDS if agree([_seconds(run, number)])[0] <= _LONGEST_S else 1
        tokens.append(number)
        seconds.append(min(_seconds(run, number) for _ in range(rounds)))
        if agree(seconds[-1:])[0] > _LONGEST_S and len(tokens) >= _FEWEST:
            break
        number *= 2
    return CostCurve(tokens, seconds)


def _seconds(run: Callable[[int], None], number: int) -> float:
    start = time.perf_counter()
    run(number)
    return time.perf_counter() - start


def agree(values: list[float]) -> list[float]:
    """Those of the first rank, on all ranks: what is measured differs, what is decided must not."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return values
    shared = torch.tensor(values, dtype=torch.float64)
    torch.distributed.broadcast(shared, src=group.ranks[0], group=group.cpu_group)
    return shared.tolist()


def agreed(curve: CostCurve) -> CostCurve:
    """The first rank's curve, on all ranks."""
    (number,) = agree([float(len(curve.points))])
    points = (curve.points * int(number))[: int(number)]  # as many as the first rank has
    tokens, seconds = (agree([float(x) for x in each]) for each in zip(*points, strict=True))
    return CostCurve([int(x) for x in tokens], seconds)
