"""What a head is trained for: loss and draft accuracy of the unrolled head against the target's own features and distributions.

EAGLE-1 (arXiv 2401.15077, section 3.2): smooth-L1 between predicted and true feature, plus 0.1 times the cross-entropy of the
target's token distribution; uniform noise on the input features stands for the head's own errors. EAGLE-3 (arXiv 2503.01840,
section 3): cross-entropy only, on every unrolled step, later steps weighing less.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_eagle.train.features.finish import Finish
from vllm_eagle.train.features.target import Features
from vllm_eagle.train.head.cross_entropy import cross_entropy, likeliest
from vllm_eagle.train.head.models import Head
from vllm_eagle.train.head.unroll import unroll


@dataclass(frozen=True, slots=True)
class LossWeights:
    """How the parts of the loss are weighed.

    Attributes:
        regression: weight of the smooth-L1 distance between features; 0 for EAGLE-3.
        classification: weight of the cross-entropy.
        step_decay: factor from one unrolled step to the next.
        noise: half width of the uniform noise on input features.
        num_steps: first pass and unrolled steps together.
        token_shift: 1 feeds the next token beside each feature; 0, for comparison only, the token of the feature itself.
    """

    regression: float = 1.0
    classification: float = 0.1
    step_decay: float = 0.8
    noise: float = 0.1
    num_steps: int = 1
    token_shift: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """Loss and accuracy of one batch."""

    loss: torch.Tensor  # scalar, what is minimised
    step_losses: torch.Tensor  # [steps], its parts, weighed
    # [steps] int64, positions where head and target agree on the most likely token; while training, on that of the draft vocabulary
    num_agreed: torch.Tensor
    num_positions: torch.Tensor  # [steps] int64


class Objective(nn.Module):
    """The head with its loss, as one module, so that data-parallel wrappers see a single forward call."""

    def __init__(self, head: Head, lm_head: nn.Module, weights: LossWeights, finish: Finish):
        super().__init__()
        if getattr(lm_head, "bias", None) is not None:
            raise ValueError("the target's LM head has a bias, which the loss does not know; targets like Llama and Qwen have none")
        self.head = head
        self.weights = weights
        self._finish = finish  # the target's
        weight: Any = lm_head.weight
        ids = head.target_ids
        # The target's, unregistered, see Head: whole, its rows of the tokens that the head can draft, and which these are.
        self._lm_head: tuple[Any] = (weight,)
        self._draft_rows: tuple[Any] = (weight if ids is None else weight[ids.to(weight.device)],)
        self._draftable: tuple[Any] = (None if ids is None else _marked(ids.to(weight.device), len(weight)),)

    def forward(
        self,
        token_ids: torch.Tensor,  # [batch, seq] int64
        loss_mask: torch.Tensor,  # [batch, seq] bool, tokens that the target emits
        features: Features,
    ) -> Outcome:
        """A batch without any position to learn from gives a loss of 0."""
        weights = self.weights
        inputs = features.inputs
        if self.training and weights.noise:
            inputs = inputs + (torch.rand_like(inputs) * 2 - 1) * weights.noise
        # Feature t' gives the distribution of token t' + 1. It is drafted when t' >= 1: token 1 comes from the target.
        emitted = F.pad(loss_mask[:, 1:], (0, 1))
        emitted[:, 0] = False
        rows, places = emitted.nonzero(as_tuple=True)
        truth = features.last[rows, places]
        (lm_head,), (draft_rows,), (draftable,) = self._lm_head, self._draft_rows, self._draftable
        learnable, best = torch.ones_like(rows, dtype=torch.bool), None
        if draftable is not None:
            # The target's distribution over the draft vocabulary says something where the token that it chose belongs to it.
            learnable = draftable[token_ids[rows, places + 1]]
            best = None if self.training else likeliest(truth, lm_head)  # a product with the whole vocabulary
        # Every parameter takes part even in a batch without positions, so that data-parallel processes stay in step.
        loss = 0.0 * torch.stack([p.sum() for p in self.head.parameters()]).sum()
        predicted, chosen, regressions = [], [], []
        for step, ready in enumerate(unroll(self.head, token_ids, inputs, weights.num_steps, weights.token_shift)):
            source = places - 1 - step  # the row whose step predicts feature `places`
            chosen.append(source >= 0)
            predicted.append(ready[rows, source.clamp(min=0)])
            if weights.regression:
                distance = F.smooth_l1_loss(predicted[step].float(), truth.float(), reduction="none").mean(-1)
                scale = weights.regression * weights.step_decay**step / chosen[step].sum().clamp(min=1)
                regressions.append(scale * (distance * chosen[step]).sum())
        counts = torch.stack(chosen)
        usable = counts & learnable
        scales = weights.classification * weights.step_decay ** torch.arange(len(chosen), device=rows.device)
        per_position = usable * (scales / usable.sum(1).clamp(min=1))[:, None]
        finishes = (self._finish, self.head.finish)
        found = cross_entropy(truth, draft_rows, predicted, self.head.lm_head_weights, per_position, *finishes)
        if best is None:
            agreed = (found.drafts == found.likeliest) & counts & learnable
        else:
            ids = self.head.target_ids
            agreed = ((found.drafts if ids is None else ids[found.drafts]) == best) & counts
        parts = torch.stack(regressions) if regressions else torch.zeros_like(found.step_losses)
        return Outcome(loss + found.loss + parts.sum(), found.step_losses + parts.detach(), agreed.sum(1), counts.sum(1))


def _marked(ids: torch.Tensor, size: int) -> torch.Tensor:
    marks = torch.zeros(size, dtype=torch.bool, device=ids.device)
    marks[ids] = True
    return marks
