"""A logits processor of a user's, for vLLM's V2 runner: what may follow a node depends on the node."""

import torch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor


class OddAfterEven(LogitsProcessor):
    """Even tokens hardly ever follow even ones, nor odd ones odd ones."""

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """In place."""
        alike = torch.arange(logits.shape[1], device=logits.device) % 2 == (ctx.input_ids % 2)[:, None]
        return logits.sub_(20.0 * alike)
