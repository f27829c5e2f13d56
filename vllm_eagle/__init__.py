"""EAGLE draft trees for stock vLLM. One step, and where it is written:

    draft    grow a tree per request with the EAGLE head              algorithm/draft.py, shapes.py, noise.py
             as deep, and keep as much of it, as pays                 budget/
    verify   one target pass over all nodes of all requests           algorithm/verify.py; attention/
    accept   sample along the tree with vLLM's sampler, keep the path algorithm/accept.py
    compact  move the path's keys and values to their own slots       algorithm/compact.py

Read algorithm/tree.py first (what a tree is), then the four above. Who runs them in vLLM: on CPUs engine/v1/ (runner.py is a step;
proposer.py drafts, scorer.py verifies and accepts, planning.py asks the budget), on CUDA engine/v2/ (runner.py, speculator.py,
sampler.py).

    algorithm/   trees in tensors and numbers; knows nothing of vLLM. config.py: what a tree can be asked to be
    budget/      how much to draft and verify: planning, keeping, and learning what passes cost and drafts are worth
    ops/         Triton kernels; native/: C++ for CPUs. Both in place of torch, where one call saves many
    attention/   backends of vLLM with tree rows, one file per device and backend
    engine/      vLLM's workers and runners with trees; v1/ for its V1 runner and CPUs, v2/ for its V2 runner and CUDA
    options/     what users set: flags, one request's, a device's; as vLLM's engine arguments
    plugin.py    the entry point that vLLM calls; llm.py is its LLM class with trees
    metrics/     counted in the worker; serving/: shown by the server, as metrics, log lines and a page; and its streams
    heads/       heads as files: told apart, checked, converted
    train/       makes heads; evaluate/ measures them; neither needs vLLM, but to write what heads learn from
    bench/       measurements: passes, speed, soak, GPUs
    files.py     files that are whole or absent
    commands/    subcommands of `vllm-eagle`, which cli.py dispatches; bootstrap.py sets up a machine, from locks/
    pair/        a small model with heads for it, and a real target, fetched if asked for; prompts/: questions to ask it

What may import what: tests/house/test_architecture.py.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_eagle.algorithm.config import TreeConfig
    from vllm_eagle.algorithm.tree import DraftTree
    from vllm_eagle.llm import LLM
    from vllm_eagle.options.engine_args import engine_args

__all__ = ["LLM", "DraftTree", "TreeConfig", "engine_args"]

# Imported when asked for: bootstrap.py runs before numpy is installed, and vLLM takes seconds.
_HOMES = {
    "LLM": "llm",
    "DraftTree": "algorithm.tree",
    "TreeConfig": "algorithm.config",
    "engine_args": "options.engine_args",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"vllm_eagle.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
