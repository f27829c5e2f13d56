"""Cross-entropy between two models' distributions over a large vocabulary, in memory for some positions at a time.

Loss and gradient are computed together, chunk by chunk, while a chunk's scores are at hand: of softmax cross-entropy the gradient
is the difference of the two distributions, and no tensor of positions x vocabulary outlives its chunk. The target's distribution
of a position is computed once for all unrolled steps that predict it. As fused linear cross-entropy does for labels (Liger Kernel,
arXiv 2410.10989, section 3.2).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from vllm_eagle.train.features.finish import Finish

_BLOCK = 128  # scores of which the largest is found first
_PLAIN = Finish()
_CHUNK = 1 << 24  # scores at a time: 64 MB in float32; four or five such tensors are alive


class CrossEntropy(NamedTuple):
    """Of all unrolled steps."""

    loss: torch.Tensor  # scalar float32: the sum over steps and positions, each by its weight
    step_losses: torch.Tensor  # [steps] float32, its parts; without gradient
    drafts: torch.Tensor  # [steps, positions] int64, the head's likeliest token
    likeliest: torch.Tensor  # [positions] int64, the target's


def cross_entropy(
    truth: torch.Tensor,  # [positions, hidden], the target's features
    target_weight: torch.Tensor,  # [vocab, hidden], the target's LM head, of the tokens that the head can draft
    predicted: Sequence[torch.Tensor],  # steps times [positions, hidden], what the head's LM head takes
    head_weights: Sequence[torch.Tensor],  # [vocab, hidden] of all steps, or one of each
    weights: torch.Tensor,  # [steps, positions] float32
    target_finish: Finish = _PLAIN,  # what becomes of the target's scores
    head_finish: Finish = _PLAIN,  # and of the head's
) -> CrossEntropy:
    """Cross-entropy of the head's distributions against the target's.

    Loss and gradients equal, within rounding, those of `-(softmax(target_finish(truth @ target_weight.T)) *
    log_softmax(head_finish(predicted[i] @ head_weight.T))).sum(-1)`, weighed and summed. No gradient reaches `truth` and
    `target_weight`.
    """
    dtype = target_weight.dtype
    if torch.is_autocast_enabled(truth.device.type):
        dtype = torch.get_autocast_dtype(truth.device.type)
    outcome = _CrossEntropy.apply(
        truth, target_weight, weights, dtype, torch.is_grad_enabled(), len(predicted), (target_finish, head_finish),
        *predicted, *head_weights,
    )  # fmt: skip
    return CrossEntropy(*outcome)


@torch.no_grad()
def likeliest(truth: torch.Tensor, target_weight: torch.Tensor) -> torch.Tensor:
    """The target's likeliest token after each of its features [positions, hidden]: [positions] int64."""
    found = torch.empty(len(truth), dtype=torch.int64, device=truth.device)
    for rows in _chunks(len(truth), len(target_weight)):
        found[rows] = _argmax(truth[rows] @ target_weight.T)
    return found


def _argmax(scores: torch.Tensor) -> torch.Tensor:
    """Of [positions, vocab] over the vocabulary. torch's own goes number by number on CPUs, its maximum does not."""
    blocks = scores.unflatten(-1, (-1, _BLOCK)) if scores.shape[-1] % _BLOCK == 0 else scores[:, None]
    block = blocks.amax(-1).argmax(-1)
    return block * blocks.shape[-1] + blocks[torch.arange(len(scores), device=scores.device), block].argmax(-1)


def _chunks(num_positions: int, vocab: int) -> Iterator[slice]:
    size = max(1, _CHUNK // vocab)
    return (slice(start, start + size) for start in range(0, num_positions, size))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        truth: torch.Tensor,
        target_weight: torch.Tensor,
        weights: torch.Tensor,
        dtype: torch.dtype,
        with_gradient: bool,
        num_steps: int,
        finishes: tuple[Finish, Finish],
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        target_finish, head_finish = finishes
        predicted, head_weights = tensors[:num_steps], tensors[num_steps:]
        ours = [weight.to(dtype) for weight in head_weights]
        theirs = target_weight.to(dtype)
        num_positions, vocab = len(truth), len(target_weight)
        losses = torch.zeros(num_steps, device=truth.device)
        drafts = torch.empty(num_steps, num_positions, dtype=torch.int64, device=truth.device)
        best = torch.empty(num_positions, dtype=torch.int64, device=truth.device)
        gradients = [torch.zeros_like(x) for x in predicted] if with_gradient else []
        learn = [weight.requires_grad and with_gradient for weight in head_weights]
        weight_gradients = [torch.zeros_like(w) if yes else None for w, yes in zip(head_weights, learn, strict=True)]
        with torch.autocast(truth.device.type, enabled=False):
            for rows in _chunks(num_positions, vocab):
                probs = target_finish((truth[rows].to(dtype) @ theirs.T).float())
                best[rows] = _argmax(probs)
                probs.sub_(probs.gather(1, best[rows, None])).exp_()
                probs.div_(probs.sum(-1, keepdim=True))
                for step in range(num_steps):
                    place = step % len(ours)
                    own = predicted[step][rows].to(dtype)
                    scores = head_finish((own @ ours[place].T).float())
                    steepness = head_finish.steepness(scores) if with_gradient else 1.0
                    drafts[step, rows] = _argmax(scores)
                    scores.sub_(scores.gather(1, drafts[step, rows, None]))
                    expected = torch.bmm(probs[:, None], scores[:, :, None])[:, 0, 0]
                    total, weight = scores.exp_().sum(-1), weights[step, rows]
                    losses[step] += (weight * (total.log() - expected)).sum()
                    if not with_gradient:
                        continue
                    # d cross-entropy / d scores: the head's distribution less the target's
                    slope = scores.mul_((weight / total)[:, None]).addcmul_(probs, weight[:, None], value=-1)
                    slope = (slope if head_finish == _PLAIN else slope.mul_(steepness)).to(dtype)
                    gradients[step][rows] = (slope @ ours[place]).to(gradients[step].dtype)
                    of_weight = weight_gradients[place]
                    if of_weight is not None:
                        of_weight += slope.T @ own
        ctx.save_for_backward(*gradients, *(g for g in weight_gradients if g is not None))
        ctx.num_steps, ctx.learn = num_steps, learn
        ctx.mark_non_differentiable(losses, drafts, best)
        return losses.sum(), losses, drafts, best

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = [slope.to(tensor.dtype) * tensor for tensor in ctx.saved_tensors]
        of_weights = iter(saved[ctx.num_steps :])
        return *[None] * 7, *saved[: ctx.num_steps], *(next(of_weights) if learn else None for learn in ctx.learn)
