"""What stands in for a part of the engine while it is entered: broken, as a comparison must notice, or told what to believe."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import fields
from itertools import cycle
from typing import Any
from unittest.mock import patch

import torch
from vllm.distributed import get_tp_group
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.warmup import warmup_kernels

from vllm_eagle.budget.budget import Budget
from vllm_eagle.budget.cost_curve import CostCurve
from vllm_eagle.engine.v2 import by_depth, late, measuring, runner, sampler, scheduler, slots, speculator
from vllm_eagle.engine.v2.budgeting import Budgeting
from vllm_eagle.engine.v2.drafts import Drafts
from vllm_eagle.ops import tree_attention
from vllm_eagle.ops.rows import TreeRows


def no_compaction() -> AbstractContextManager[Any]:
    """Accepted nodes' keys and values stay where they were scored."""
    return patch.object(runner.EagleTreeRunner, "_moves", property(lambda self: [], lambda self, moves: None), create=True)


def causal_trees() -> AbstractContextManager[Any]:
    """Nodes see all nodes before them, ancestors or not."""
    stock = slots.TreeRows

    def all_seen(*args: Any) -> Any:
        *others, visible = args
        return stock(*others, torch.ones_like(visible).tril())

    return patch.object(slots, "TreeRows", all_seen)


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


def chains_for_trees() -> AbstractContextManager[Any]:
    """Grammars take a tree's nodes for a chain."""
    return patch.object(scheduler, "parents_of", lambda drafts: [list(range(len(row))) for row in drafts.draft_token_ids])


def drafting_fails() -> AbstractContextManager[Any]:
    """At the third time."""
    stock, calls = speculator.TreeSpeculator._draft, []

    def draft(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("as a test wants it")
        return stock(self, *args)

    return patch.object(speculator.TreeSpeculator, "_draft", draft)


def drafting_comes_and_goes() -> AbstractContextManager[Any]:
    """Nothing is planned for some steps, then for some everything."""
    plans = cycle([Drafts(8, 3)] * 3 + [Drafts(0, 0)] * 6)
    return patch.object(Budgeting, "plan", lambda self, num_decoding: next(plans))


def nothing_is_put_off() -> AbstractContextManager[Any]:
    """The head sees all tokens at once."""
    return patch.object(speculator.TreeSpeculator, "_puts_off", lambda self, batch, features: False)


def little_can_be_put_off() -> AbstractContextManager[Any]:
    """There is room for three steps of two requests."""
    stock = runner.Backlog
    return patch.object(runner, "Backlog", lambda slots, dtype, device: stock(slots, dtype, device, 7 * 384 * 4))


def what_was_put_off_is_dropped() -> AbstractContextManager[Any]:
    """The head never catches up."""
    return patch.object(speculator, "catch_up", lambda *args: None)


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


def ranks_see_other_times() -> AbstractContextManager[Any]:
    """All but the first rank measure that drafting never pays, and nothing that they have sent for ever arrives."""
    stack, measured, poll = ExitStack(), measuring.measured, late.LateReads.poll
    curves = (CostCurve([1, 64], seconds) for seconds in ([1.0, 1.0], [10.0, 10.0]))
    dear = Budget(*curves, 8, 3)
    stack.enter_context(patch.object(measuring, "measured", lambda its: (dear, measured(its))[_is_first()]))
    stack.enter_context(patch.object(late.LateReads, "poll", lambda self: poll(self) if _is_first() else None))
    return stack


def ranks_draft_for_themselves() -> AbstractContextManager[Any]:
    """The second rank's trees have other tokens."""
    stock = speculator.rerank

    def ranked(roots: torch.Tensor, tokens: torch.Tensor, *args: Any) -> Any:
        return stock(roots, tokens if _is_first() else tokens + 1, *args)

    return patch.object(speculator, "rerank", ranked)


def _is_first() -> bool:
    return get_tp_group().rank_in_group == 0


def stale_trees() -> AbstractContextManager[Any]:
    """What kernels take is copied, and the copies are kept: a graph goes on reading those of its capture."""
    kept: list[TreeRows] = []
    return patch.object(slots.BatchTrees, "rows", _copies(kept.append))


def fleeting_trees() -> AbstractContextManager[Any]:
    """What kernels take is copied, and nobody keeps the copies."""
    return patch.object(slots.BatchTrees, "rows", _copies(lambda rows: None))


def _copies(keep: Callable[[TreeRows], object]) -> Any:
    stock = slots.BatchTrees.rows

    def rows(self: Any, block_table: torch.Tensor, most_rows: int) -> TreeRows:
        found = stock(self, block_table, most_rows)
        fresh = TreeRows(block_table, *(getattr(found, field.name).clone() for field in fields(TreeRows)[1:]))
        keep(fresh)
        return fresh

    return rows


def options_from_the_host() -> AbstractContextManager[Any]:
    """Limits of depth are sent while the batch is drafted."""
    stock = speculator.Batch

    def sent(budgets: torch.Tensor, temperatures: torch.Tensor, max_depths: torch.Tensor, *others: Any) -> Any:
        return stock(budgets, temperatures, torch.tensor([8] * len(max_depths)), *others)

    return patch.object(speculator, "Batch", sent)


# Not breakages, but what a test bed without adaptive verification or a large GPU does not have.


def warmed_up() -> AbstractContextManager[Any]:
    """Before requests come vLLM runs steps with requests of its own, as on a GPU: prompts, then drafts that nobody has drafted."""
    stock = CPUWorker.compile_or_warm_up_model

    def warm_up(self: Any) -> Any:
        warmup_kernels(self.model_runner, self.execute_model, self.sample_tokens)
        return stock(self)

    return patch.object(CPUWorker, "compile_or_warm_up_model", warm_up)


def graphs_of_any_rows() -> AbstractContextManager[Any]:
    """Captured passes take any number of rows per request, as with vLLM's adaptive verification."""
    stock = cudagraph_utils.ModelCudaGraphManager.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **(kwargs | {"varlen_decode": True}))

    return patch.object(cudagraph_utils.ModelCudaGraphManager, "__init__", init)


def launches_between_replays() -> AbstractContextManager[Any]:
    """Every other time a graph is taken to do far more than is planned."""
    turns = cycle((False, True))
    return patch.object(speculator.TreeSpeculator, "_is_worth_it", lambda *args: next(turns))


def splits() -> AbstractContextManager[Any]:
    """Contexts are cut into parts, as where a GPU has more multiprocessors than a batch has work for."""
    return patch.object(tree_attention, "_multiprocessors", lambda device: 8)
