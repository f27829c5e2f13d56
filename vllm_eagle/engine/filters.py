"""The target's top-k and top-p on the head's logits: what the target cannot sample is not worth drafting."""

import torch
from vllm.v1.sample.metadata import SamplingMetadata

# Tokens per node that are put in order. Where top-k or top-p lets more through, all are let through: sorting a whole vocabulary
# for every drafted node costs more than the few drafts that it would spare.
MOST_SORTED = 64
EVERYTHING = float("-inf")


class Filters:
    """Made once per step, for the requests that draft.

    Args:
        top_k: [num_drafting] integers, the vocabulary's size where all tokens are let through; None: of no request.
        top_p: [num_drafting], 1 where all tokens are let through; None: of no request.
        temperature: [num_drafting], 0 is greedy; None: all are.
    """

    def __init__(self, top_k: torch.Tensor | None, top_p: torch.Tensor | None, temperature: torch.Tensor | None):
        self._top_k, self._top_p = None if top_k is None else top_k.long(), top_p
        self._temperature = None if temperature is None else torch.where(temperature > 0, temperature, 1.0)
        self._active = top_k is not None or top_p is not None

    @classmethod
    def of(cls, metadata: SamplingMetadata, chosen: torch.Tensor) -> "Filters":
        """From the metadata of vLLM's V1 runner, which lists top-k and top-p only if a request that samples asks for them."""
        listed = (metadata.top_k, metadata.top_p, metadata.temperature)
        return cls(*(None if values is None else values[chosen] for values in listed))

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [num_drafting, (width,) vocab] with impossible tokens at minus infinity."""
        if not self._active:
            return logits
        scaled = logits.float()
        if self._temperature is not None:
            scaled = scaled / _as_column(self._temperature, logits)
        best = scaled.topk(min(MOST_SORTED, scaled.shape[-1]), dim=-1).values  # [..., listed], falling
        total = scaled.logsumexp(-1, keepdim=True)
        lowest = torch.full_like(total, EVERYTHING)
        if self._top_k is not None:
            top_k = _as_column(self._top_k, logits)
            listed = top_k <= best.shape[-1]
            lowest = torch.where(listed, best.gather(-1, top_k.clamp(max=best.shape[-1]).expand_as(total) - 1), lowest)
            # Top-p counts probabilities among what top-k leaves.
            beyond = torch.arange(best.shape[-1], device=best.device) >= top_k
            total = torch.where(listed, best.masked_fill(beyond, EVERYTHING).logsumexp(-1, keepdim=True), total)
        if self._top_p is not None:
            probabilities = (best - total).exp()
            above = probabilities.cumsum(-1) - probabilities  # the mass of all better tokens
            kept = (above < _as_column(self._top_p, logits)).sum(-1, keepdim=True)
            nucleus = best.gather(-1, kept.clamp(min=1) - 1)
            lowest = torch.where(kept < best.shape[-1], torch.maximum(lowest, nucleus), lowest)
        return logits.masked_fill(scaled < lowest, EVERYTHING)


def _as_column(values: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """One value per request, to go with logits [num_drafting, (width,) vocab]."""
    return values.view(-1, *[1] * (logits.dim() - 1))
