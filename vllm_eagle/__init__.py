"""EAGLE draft trees for stock vLLM. One step, and where it is written:

    draft    grow a tree per request with the EAGLE head              draft.py, shapes.py, noise.py; engine/proposer.py
             as deep, and keep as much of it, as pays                 budget.py, cost_curve.py, calibration.py;
                                                                      engine/planning.py, costs.py, backlog.py
    verify   one target pass over all nodes of all requests           verify.py; attention/; engine/runner.py
    accept   sample along the tree with vLLM's sampler, keep the path accept.py, node_noise.py; engine/scorer.py
    compact  move the path's keys and values to their own slots       compact.py; engine/runner.py

Read tree.py first (what a tree is), then the four above. They know nothing of vLLM; engine/ does, attention/ (a backend),
plugin.py (the entry point), serving/ (metrics and the live page), llm.py and bench/, and nothing else.

What users set: config.py and flags.py (options), per_request.py (one request's), serve.py (turned into vLLM's). What operators see:
metrics.py counts in the worker, stats_file.py carries it to the server, serving/ shows it, matrix.py lists what works together.
native/ is the C++ that CPUs run in place of torch, where one call saves many. bench/ measures speed and simulates other hardware.
train/ makes heads, evaluate/ measures them without vLLM, heads/ converts and inspects them; pair/ is a small model with its head.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_eagle.config import TreeConfig
    from vllm_eagle.llm import LLM
    from vllm_eagle.tree import DraftTree

__all__ = ["LLM", "DraftTree", "TreeConfig"]

# Imported when asked for: bootstrap.py runs before numpy is installed, and vLLM takes seconds.
_HOMES = {"LLM": "llm", "DraftTree": "tree", "TreeConfig": "config"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"vllm_eagle.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
