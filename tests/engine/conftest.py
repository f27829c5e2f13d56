"""What vLLM does to other libraries' classes is undone, so that tests do not disturb each other."""

from collections.abc import Iterator

import pytest
from transformers import Olmo2Model, SmolLM3Model

from vllm_eagle.algorithm import draft


@pytest.fixture(autouse=True)
def transformers_as_it_was() -> Iterator[None]:
    """Where vLLM serves through transformers it decorates their classes in place, and these then ask for vLLM's configuration."""
    before = [(cls, cls.__bases__, dict(vars(cls))) for cls in (Olmo2Model, SmolLM3Model)]
    yield
    for cls, bases, attributes in before:
        if cls.__bases__ == bases:
            continue
        cls.__bases__ = bases
        for name in vars(cls).keys() - attributes.keys():
            delattr(cls, name)
        for name, value in attributes.items():
            if vars(cls)[name] is not value:
                setattr(cls, name, value)


@pytest.fixture
def full_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise weighs what it weighs in the sampler, which is right for drafters that know the target and for no others."""
    monkeypatch.setattr(draft, "NOISE_WEIGHT", 1.0)
