"""What a comparison must notice: each breaks one thing of the engine while it is entered."""

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch

from vllm_eagle.engine.v2 import runner


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
