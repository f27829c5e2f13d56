"""What stands in for a part of the engine while it is entered: broken, as a comparison must notice, or told what to believe."""

from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest.mock import patch

import torch

from vllm_eagle.budget.budget import Budget
from vllm_eagle.budget.cost_curve import CostCurve
from vllm_eagle.engine.v2 import by_depth, measuring, runner, sampler, speculator
from vllm_eagle.engine.v2.budgeting import Budgeting


def no_compaction() -> AbstractContextManager[Any]:
    """Accepted nodes' keys and values stay where they were scored."""
    return patch.object(runner.EagleTreeRunner, "_moves", property(lambda self: [], lambda self, moves: None), create=True)


def causal_trees() -> AbstractContextManager[Any]:
    """Nodes see all nodes before them, ancestors or not."""
    stock = runner.TreeRows

    def all_seen(*args: Any) -> Any:
        *others, visible = args
        return stock(*others, torch.ones_like(visible).tril())

    return patch.object(runner, "TreeRows", all_seen)


def positions_by_row() -> AbstractContextManager[Any]:
    """Nodes stand at consecutive positions."""

    def prepare(self: Any, batch: Any) -> Any:
        return super(runner.EagleTreeRunner, self).prepare_attn(batch)

    return patch.object(runner.EagleTreeRunner, "prepare_attn", prepare)


def noise_of_elsewhere() -> AbstractContextManager[Any]:
    """The sampler draws the noise of another position for nodes below the root."""
    stock, stack = sampler.draw, ExitStack()

    def draw(its: Any, logits: Any, part: Any, slots: Any, places: Any, positions: Any, *rest: Any) -> Any:
        return stock(its, logits, part, slots, places, positions + places, *rest)

    for module in (sampler, by_depth):
        stack.enter_context(patch.object(module, "draw", draw))
    return stack


def drafting_fails() -> AbstractContextManager[Any]:
    """At the third time."""
    stock, calls = speculator.TreeSpeculator._draft, []

    def draft(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("as a test wants it")
        return stock(self, *args)

    return patch.object(speculator.TreeSpeculator, "_draft", draft)


def _believing(target: list[float], head: list[float]) -> AbstractContextManager[Any]:
    """The budget takes passes for so expensive at 1, 2, 4, ... tokens, whatever time they take."""
    stack = ExitStack()

    def measured(runner: Any) -> Budget:
        config = runner.tree_config
        curves = (CostCurve([2**i for i in range(len(curve))], curve) for curve in (target, head))
        return Budget(*curves, config.num_draft_tokens, config.depth_limit)

    stack.enter_context(patch.object(measuring, "measured", measured))
    for name in ("passed", "spent"):
        stack.enter_context(patch.object(Budgeting, name, lambda *args: None))
    return stack


def nodes_cost() -> AbstractContextManager[Any]:
    """Every node costs something, so that not all of a tree are worth their place."""
    return _believing([1.0, 1.02, 1.06, 1.14, 1.3, 1.62, 2.26], [0.01] * 7)


def drafting_never_pays() -> AbstractContextManager[Any]:
    """The head is as slow as ten target passes."""
    return _believing([1.0] * 7, [10.0] * 7)
