"""The loss in chunks is the loss in one piece, and so are its gradients."""

import subprocess
import sys

import pytest
import torch

from tests.tiers import some
from vllm_eagle.train.features.finish import Finish
from vllm_eagle.train.head import cross_entropy as module
from vllm_eagle.train.head.cross_entropy import CrossEntropy, cross_entropy, likeliest

POSITIONS, HIDDEN, VOCAB, STEPS = 23, 16, 50, 3
PLAIN = Finish()


def whole(
    truth: torch.Tensor,
    target_weight: torch.Tensor,
    predicted: list[torch.Tensor],
    head_weights: list[torch.Tensor],
    weights: torch.Tensor,
    target_finish: Finish,
    head_finish: Finish,
) -> CrossEntropy:
    """With all tensors of positions x vocabulary."""
    target = target_finish(truth @ target_weight.T)
    losses, drafts = [], []
    for step, own in enumerate(predicted):
        scores = head_finish(own @ head_weights[step % len(head_weights)].T)
        losses.append((weights[step] * -(target.softmax(-1) * scores.log_softmax(-1)).sum(-1)).sum())
        drafts.append(scores.argmax(-1))
    return CrossEntropy(torch.stack(losses).sum(), torch.stack(losses), torch.stack(drafts), target.argmax(-1))


def inputs(num_weights: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return (
        random(POSITIONS, HIDDEN),
        random(VOCAB, HIDDEN),
        [random(POSITIONS, HIDDEN).requires_grad_() for _ in range(STEPS)],
        [random(VOCAB, HIDDEN).requires_grad_() for _ in range(num_weights)],
        random(STEPS, POSITIONS).abs() * (random(STEPS, POSITIONS) > 0),
    )


@pytest.mark.parametrize("chunk", [1, 7 * VOCAB, 1 << 24], ids=["one position", "seven", "all"])
@pytest.mark.parametrize("num_weights", [1, STEPS])
@pytest.mark.parametrize(
    "finishes",
    [(PLAIN, PLAIN), (Finish(0.125), Finish(0.125)), (Finish(0.5, 3.0), Finish(0.5, 3.0)), (Finish(cap=5.0), PLAIN)],
    ids=["plain", "scaled", "capped and scaled", "capped, the head not"],
)
def test_loss_and_gradients_are_those_of_the_whole(
    finishes: tuple[Finish, Finish], num_weights: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    truth, target_weight, predicted, head_weights, weights = inputs(num_weights)
    leaves = [*predicted, *head_weights]
    expected, found = (f(truth, target_weight, predicted, head_weights, weights, *finishes) for f in (whole, cross_entropy))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    # What comes after the loss scales its gradient.
    for one, other in zip(torch.autograd.grad(3 * expected.loss, leaves), torch.autograd.grad(3 * found.loss, leaves), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert torch.equal(likeliest(truth, target_weight), expected.likeliest)


def test_a_frozen_lm_head_gets_no_gradient() -> None:
    truth, target_weight, predicted, head_weights, weights = inputs(1)
    frozen = head_weights[0].detach()
    cross_entropy(truth, target_weight, predicted, [frozen], weights).loss.backward()
    assert frozen.grad is None
    assert all(own.grad is not None for own in predicted)
    with torch.no_grad():
        assert not cross_entropy(truth, target_weight, predicted, [frozen], weights).loss.requires_grad


def test_no_positions() -> None:
    nothing = torch.zeros(0, HIDDEN)
    found = cross_entropy(nothing, torch.ones(VOCAB, HIDDEN), [nothing.clone().requires_grad_()], [torch.ones(VOCAB, HIDDEN)], torch.zeros(1, 0))  # fmt: skip  # noqa: E501
    found.loss.backward()
    assert found.loss.item() == 0


MEMORY = """
import resource, torch
from vllm_eagle.train.head.cross_entropy import cross_entropy

truth, weight = torch.randn({positions}, 8), torch.randn(128_000, 8)
predicted = [truth.clone().requires_grad_()]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cross_entropy(truth, weight, predicted, [weight], torch.ones(1, {positions})).loss.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("positions", some((1024, 4096), 1024))
def test_memory_is_that_of_a_chunk(positions: int) -> None:
    """Whole, a single tensor of 4,096 positions over 128k tokens takes 2 GB, and there would be five."""
    command = [sys.executable, "-c", MEMORY.format(positions=positions)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1 << 20  # kB: a GB
