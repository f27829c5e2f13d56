"""Filters on drafts let through what vLLM's sampler lets through."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from vllm_eagle.engine.filters import MOST_SORTED, Filters

VOCAB = 200


def metadata(**fields: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(**({"top_k": None, "top_p": None, "temperature": None} | fields))


@pytest.mark.parametrize("width", [None, 3])
@pytest.mark.parametrize("which", ["top_k", "top_p", "both"])
def test_same_as_vllm(which: str, width: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    top_k, top_p = torch.tensor([1, 5, 20, VOCAB], dtype=torch.int32), torch.tensor([0.9, 0.3, 0.99, 0.6])
    temperature = torch.tensor([1.0, 0.7, 2.0, 0.0])
    fields = {"top_k": top_k, "top_p": top_p} if which == "both" else {which: top_k if which == "top_k" else top_p}
    logits = 4 * torch.randn(4, *([width] if width else []), VOCAB, generator=generator)
    found = Filters.of(metadata(temperature=temperature, **fields), torch.arange(4))(logits)  # type: ignore[arg-type]
    rows = width or 1
    by_row = temperature.where(temperature > 0, 1.0).repeat_interleave(rows)[:, None]
    repeated = {name: value.repeat_interleave(rows) for name, value in fields.items()}
    flat = logits.reshape(-1, VOCAB) / by_row
    expected = apply_top_k_top_p(flat.clone(), repeated.get("top_k"), repeated.get("top_p"))
    few = expected.isfinite().sum(-1) < MOST_SORTED
    assert few.sum() >= 2 * rows  # else nothing was tested
    assert found.reshape(-1, VOCAB).isfinite()[few].equal(expected.isfinite()[few])
    kept = found.isfinite()
    assert found[kept].equal(logits[kept])
    # Where more pass than are put in order, none is lost.
    assert (found.reshape(-1, VOCAB).isfinite() | ~expected.isfinite()).all()


def test_without_filters_nothing_is_touched() -> None:
    logits = torch.randn(2, 5)
    assert Filters.of(metadata(temperature=torch.tensor([1.0, 0.0])), torch.arange(2))(logits) is logits  # type: ignore[arg-type]


def test_only_the_chosen_requests_count() -> None:
    found = Filters.of(metadata(top_k=torch.tensor([1, 3], dtype=torch.int32)), torch.tensor([1]))(torch.arange(9.0)[None])  # type: ignore[arg-type]
    assert found.isfinite().sum() == 3


def test_nan_passes_on() -> None:
    """Growth knows what to do with it."""
    logits = torch.full((1, 9), float("nan"))
    assert Filters.of(metadata(top_p=torch.tensor([0.5])), torch.arange(1))(logits).isnan().any()  # type: ignore[arg-type]
