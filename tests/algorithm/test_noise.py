import math
from collections.abc import Iterator

import pytest
import torch
import vllm._custom_ops  # noqa: F401  loads the CPU kernels
from hypothesis import given
from hypothesis import strategies as st

from tests.algorithm import reference
from vllm_eagle import native
from vllm_eagle.algorithm.noise import gumbel, peek_seeds


@pytest.fixture(autouse=True, params=[True, False], ids=["native", "torch"])
def _with_and_without_our_operators(request: pytest.FixtureRequest) -> Iterator[None]:
    assert native.problem() is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "runs", lambda: request.param)
        yield


@given(st.integers(0, 2**31 - 1))
def test_gumbel_equals_the_hash_in_unbounded_integers(seed: int) -> None:
    expected = [reference.gumbel(seed, token) for token in range(20)]
    assert gumbel(torch.tensor(seed), 20).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    some = torch.tensor([3, 11, 19])
    assert gumbel(torch.tensor(seed), some).tolist() == pytest.approx([expected[i] for i in some], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("vocab", [7, 4096, 32001])
def test_gumbel_is_the_noise_of_vllms_sampler(vocab: int) -> None:
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    seeds = torch.randint(0, 2**31, (64,), generator=torch.Generator().manual_seed(1))
    noisy = logits + gumbel(seeds, vocab)
    sampled = torch.ops._C.fused_gumbel_argmax(logits, seeds)
    best = noisy.amax(-1)
    assert torch.allclose(noisy.gather(1, sampled[:, None])[:, 0], best, atol=1e-5)  # equal but for ties in rounding


def test_gumbel_follows_its_distribution() -> None:
    noise = gumbel(torch.arange(200), 1000)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.std().item() == pytest.approx(math.pi / 6**0.5, abs=0.02)


def test_peeking_consumes_nothing_and_sees_what_comes() -> None:
    generator = torch.Generator().manual_seed(5)
    torch.randint(0, 2**31, (1,), generator=generator)
    seen = peek_seeds(generator, 4)
    assert torch.equal(seen, peek_seeds(generator, 4))
    drawn = [torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long).item() for _ in range(4)]
    assert seen.tolist() == drawn
