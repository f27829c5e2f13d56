"""Noise where vLLM's sampler fills a row per position from the request's generator, as it does on GPUs: its own code, on CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.ops.topk_topp_sampler import random_sample

from tests.engine.engines import engine, generate, tokens, tree_stats, trees
from vllm_eagle.algorithm.noise_rows import NoiseRows
from vllm_eagle.bench.engines.offline import encode_prompts
from vllm_eagle.pair import HEAD, TARGET

VOCAB = 300
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def generators(num: int) -> list[torch.Generator]:
    """Some of them have been used before."""
    found = [torch.Generator().manual_seed(seed) for seed in range(num)]
    for i, generator in enumerate(found):
        torch.empty(i).exponential_(generator=generator)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_coming_rows_are_those_that_vllm_draws(dtype: str) -> None:
    """`argmax(logits + noise)` is what its sampler takes, position by position."""
    own = generators(3)
    noise = NoiseRows(own, VOCAB, DTYPES[dtype])
    logits = torch.randn(5, 3, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = [(logits[depth - 1] + noise.at(depth)).argmax(-1) for depth in range(1, 6)]
    for one in range(5):
        sampled = random_sample(logits[one].softmax(-1), dict(enumerate(own)), use_fp64_gumbel=dtype == "float64")
        assert sampled.equal(expected[one])


def test_looking_ahead_consumes_nothing() -> None:
    own, others = generators(4), generators(4)
    noise = NoiseRows(own, VOCAB)
    for depth in (1, 2, 5):
        noise.at(depth)
        for one, other in zip(own, others, strict=True):
            assert one.get_state().equal(other.get_state())


def test_positions_may_be_left_out_but_not_gone_back_to() -> None:
    step_by_step, skipping = (NoiseRows(generators(2), VOCAB) for _ in range(2))
    rows = [step_by_step.at(depth) for depth in (1, 2, 3)]
    assert skipping.at(3).equal(rows[2])
    with pytest.raises(ValueError, match="depth 3 was asked for after depth 3"):
        skipping.at(3)


def test_generators_are_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    own, others = generators(2), generators(2)
    noise = NoiseRows(own, VOCAB, torch.int64)  # no numbers of this type follow an exponential distribution
    with pytest.raises((RuntimeError, NotImplementedError)):
        noise.at(1)
    assert all(one.get_state().equal(other.get_state()) for one, other in zip(own, others, strict=True))


def test_noise_follows_the_gumbel_distribution() -> None:
    noise = NoiseRows(generators(40), 5000).at(1)
    assert noise.dtype == torch.float32
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.std().item() == pytest.approx(1.2825, abs=0.02)


# With use_fp64_gumbel vLLM's sampler draws rows on CPU, too: the whole engine, without a GPU.
ROWS = {"use_fp64_gumbel": True, "max_num_batched_tokens": 4096}
PROMPTS = encode_prompts(str(TARGET), None, 6)
PARAMS = [SamplingParams(temperature=[1.0, 0.0, 0.7][i % 3], seed=i, max_tokens=48) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def plain() -> list[list[list[int]]]:
    with engine(TARGET, **ROWS) as llm:
        return tokens(generate(llm, PROMPTS, PARAMS))


@pytest.mark.parametrize("options", [{}, {"coupled": False}, {"mode": "static"}], ids=["coupled", "uncoupled", "static"])
def test_tokens_equal_plain_vllm(options: dict[str, Any], plain: list[list[list[int]]]) -> None:
    with engine(TARGET, **ROWS, **trees(HEAD, 16, **options)) as llm:
        assert tokens(generate(llm, PROMPTS, PARAMS)) == plain


def test_tokens_equal_plain_vllm_where_some_are_filtered() -> None:
    """In batches that know nothing but temperature, top-k and top-p."""
    params = [p.clone() for p in PARAMS]
    params[0].top_p, params[1].top_k, params[2].top_p = 0.9, 20, 0.8
    with engine(TARGET, **ROWS) as llm:
        expected = tokens(generate(llm, PROMPTS, params))
    with engine(TARGET, **ROWS, **trees(HEAD, 16)) as llm:
        assert tokens(generate(llm, PROMPTS, params)) == expected


def accepted(**options: Any) -> float:
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=48) for i in range(len(PROMPTS))]
    with engine(TARGET, **ROWS, **trees(Path(HEAD), 16, **options)) as llm:
        generate(llm, PROMPTS, params)
        return float(tree_stats(llm)["tau"])


def test_drafting_with_the_coming_noise_is_accepted_more_often() -> None:
    """The drafter sees the very rows that the sampler will draw, or this would not be so."""
    assert accepted() > accepted(coupled=False) + 0.2
