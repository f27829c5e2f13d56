"""A logits processor of a user's, for vLLM's V2 runner: what may follow a node depends on the node."""

import torch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor


class NoRepetition(LogitsProcessor):
    """The last token and the one after it are hardly ever next."""

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """In place."""
        rows = torch.arange(len(logits), device=logits.device)
        for token in (ctx.input_ids.long(), (ctx.input_ids.long() + 1) % logits.shape[1]):
            logits[rows, token] -= 20.0
        return logits
