"""Medusa heads (arXiv 2401.10774), for comparison with EAGLE only: head i guesses the token i + 2 after the feature, alone.

The weights go into the format that vLLM 0.32 serves with `method: medusa` (later versions dropped it).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_eagle.train.head.layer import Memory
from vllm_eagle.train.head.models import Head


class _Block(nn.Module):
    def __init__(self, hidden_size: int):
        super().__init__()
        linear = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.zeros_(linear.weight)  # starts as the target's own LM head, as the paper does
        self.layers = nn.ModuleList([linear])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + F.silu(self.layers[0](hidden))


class MedusaHead(Head):
    """One residual block and one LM head per drafted token; no attention, no tokens as input."""

    def __init__(self, config: Any, embed: nn.Module, lm_head: Any, num_heads: int):
        super().__init__(config, embed)
        self.blocks = nn.ModuleList([_Block(config.hidden_size) for _ in range(num_heads)])
        own = [nn.Linear(config.hidden_size, config.vocab_size, bias=False) for _ in range(num_heads)]
        for linear in own:
            linear.weight.data.copy_(lm_head.weight.data)
        self.lm_heads = nn.ModuleList(own)

    @property
    def max_steps(self) -> int | None:
        return len(self.blocks)

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        return features

    def drafts(self, features: torch.Tensor, num_steps: int) -> Iterator[torch.Tensor]:
        """num_steps times [batch, seq, hidden]."""
        for block in self.blocks[:num_steps]:
            yield block(features.to(next(block.parameters()).dtype))

    def forward(
        self, token_ids: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor, memory: Memory
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("a Medusa head is not run token by token")

    @property
    def lm_head_weights(self) -> list[torch.Tensor]:
        return [linear.weight for linear in self.lm_heads]  # type: ignore[misc]

    def logits(self, ready: torch.Tensor, step: int = 0) -> torch.Tensor:
        return self.lm_heads[step](ready)


def medusa_settings(config: Any, num_heads: int, dtype: str) -> dict[str, Any]:
    """config.json for vLLM."""
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_heads": num_heads,
        "num_hidden_layers": 1,
        "medusa_fc_bias": False,
        "dtype": dtype,
    }
