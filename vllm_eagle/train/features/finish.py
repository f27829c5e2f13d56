"""What a target makes of the products with its LM head: some cap them softly (Gemma 2), some scale them (Granite, Cohere).

vLLM hands both on to a head that drafts with the target's LM head, so such a head learns and drafts with them. A head with an LM
head of its own learns the target's distribution as it comes out, and has neither.
"""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Finish:
    """logits = scale * cap * tanh(products / cap), as vLLM's LogitsProcessor has it; without a cap, scale * products."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "Finish":
        """As a config of transformers names it; whether that is all is for the caller to see."""
        scale = getattr(config, "logit_scale", None) or 1.0
        return cls(scale / (getattr(config, "logits_scaling", None) or 1.0), getattr(config, "final_logit_softcapping", None))

    def __call__(self, products: torch.Tensor) -> torch.Tensor:
        """Products with the LM head [..., vocab] -> logits of the same shape; the very tensor where there is nothing to do."""
        if self.cap is not None:
            products = self.cap * torch.tanh(products / self.cap)
        return products if self.scale == 1.0 else products * self.scale

    def steepness(self, logits: torch.Tensor) -> torch.Tensor | float:
        """By how much logits [..., vocab] rise with their products: of the same shape, or one number for all."""
        if self.cap is None:
            return self.scale
        return (logits / (self.scale * self.cap)).square_().neg_().add_(1.0).mul_(self.scale)
