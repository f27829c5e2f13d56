"""The drafts of a batch, split between its requests on the device: the most probable nodes of all trees, as many as were planned.

In the shape of vLLM's adaptive verification, which the runner calls where its batches are laid out. vLLM plans the total from
confidences that it reads a step later, and waits for; ours comes with what is scheduled (drafts.py), so all ranks have one, and
nothing is read here.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.adaptive_verification import (
    AdaptiveVerificationManager,
    _assign_draft_token_budget_compiled,
)


class DraftSplit(AdaptiveVerificationManager):
    """In place of vLLM's manager.

    Attributes:
        per_request: nodes that a request has on the average in the coming step, roots left out; None: all that are scheduled.
        has_drafted: whether the step that ends has drafted, so that there are new confidences.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.per_request: float | None = None
        self.has_drafted = False
        self._confidence_probs.fill_(1.0)

    def add_request(self, req_idx: int) -> None:
        """Until something is drafted for it, whatever is scheduled for it may be."""
        self._confidence_probs[req_idx].fill_(1.0)

    def batches_to_profile(self, capture_sizes: list[int]) -> Iterator[dict[str, int]]:
        """None: what passes cost is measured elsewhere."""
        return iter(())

    def set_initial_cost_curves(self, samples: list[Any]) -> None:
        """There are none."""

    def record_confidences(self, confidence_probs: torch.Tensor, input_batch: InputBatch) -> None:
        """Chances [num_reqs, num_steps] of each node if those before it in its tree's order are accepted; their product falls."""
        if self.has_drafted:
            self._confidence_probs[input_batch.idx_mapping] = confidence_probs[: input_batch.num_reqs]

    def get_num_tokens(self, num_tokens_per_req: dict[str, int], draft_tokens: dict[str, list[int]]) -> int:
        """Tokens of the batch once its drafts are as many as planned, or as logits in one piece allow."""
        drafts = {req_id: len(draft_tokens.get(req_id, ())) for req_id in num_tokens_per_req}
        others = {req_id: number - drafts[req_id] for req_id, number in num_tokens_per_req.items()}
        scheduled, with_drafts = sum(drafts.values()), sum(number > 0 for number in drafts.values())
        wanted = scheduled if self.per_request is None else math.ceil(self.per_request * with_drafts)
        total = min(scheduled, wanted, max(0, self._max_total_logits - len(drafts) * self.num_bonus_tokens))
        self._batch_budget = drafts, others, total
        return sum(others.values()) + total

    def warm_up(self) -> None:
        """Compile what `reallocate_drafts` calls."""
        one = torch.zeros(1, dtype=torch.int64, device=self._confidence_probs.device)
        capacities = torch.full((1,), self.num_speculative_steps, dtype=torch.int32, device=one.device)
        _assign_draft_token_budget_compiled(self._confidence_probs, one, capacities, 1, self.num_speculative_steps)
