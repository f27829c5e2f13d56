"""Other families than Llama: heads that the trainer makes serve with trees, tokens as without, tau as `eval` says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

from tests.engine.engines import engine, generate, tokens, tree_stats, trees
from tests.engine.families import (
    MARGIN,
    NUM_DRAFT_TOKENS,
    NUM_TOKENS,
    PROMPTS,
    TARGETS,
    expected_tau,
    model_of,
    overfitted,
    said,
)
from tests.tiers import exhaustive, some
from vllm_eagle.engine.features import LISTENED
from vllm_eagle.train.features.target import FrozenTarget
from vllm_eagle.train.head.files import save_head
from vllm_eagle.train.run.settings import Method

TEMPERATURES = (0.0, 1.0)


def asked(llm: LLM, temperature: float, length: int) -> list[list[list[int]]]:
    params = [
        SamplingParams(temperature=temperature, seed=i, max_tokens=length, ignore_eos=True, detokenize=False)
        for i in range(len(PROMPTS))
    ]
    return tokens(generate(llm, PROMPTS, params))


def assert_served(folder: Path, family: str, method: Method, **options: Any) -> None:
    """Tokens are plain vLLM's, and a head that knows what they will be is accepted as `eval` expects."""
    model_of(family).save_pretrained(folder / "target")
    target = FrozenTarget(folder / "target", torch.float32)
    for module in target.model.modules():
        module.do_not_compile = True  # vLLM decorates some of transformers' classes, and asks this of what was made before, too
    with engine(folder / "target", skip_tokenizer_init=True, **options) as llm:
        plain = {temperature: asked(llm, temperature, NUM_TOKENS + MARGIN) for temperature in TEMPERATURES}
    texts = {temperature: said(replies, temperature) for temperature, replies in plain.items()}
    head = overfitted(target, method, [text for some in texts.values() for text in some])
    save_head(head, folder / "head", torch.float32)
    with engine(folder / "target", skip_tokenizer_init=True, **options, **trees(folder / "head", NUM_DRAFT_TOKENS)) as llm:
        for temperature in TEMPERATURES:
            llm.collective_rpc("reset_eagle_stats")
            assert asked(llm, temperature, NUM_TOKENS) == [[reply[:NUM_TOKENS]] for [reply] in plain[temperature]]
            measured = tree_stats(llm)["tau"]
            assert measured == pytest.approx(expected_tau(target, head, texts[temperature], temperature), rel=0.03)
            assert measured > 1.5


CASES: list[tuple[str, Method]] = [(family, method) for family in TARGETS for method in ("eagle", "eagle3")]


@pytest.mark.parametrize(("family", "method"), some(CASES, ("Gemma2", "eagle3"), ("Granite", "eagle")))
def test_served_with_trees(tmp_path: Path, family: str, method: Method) -> None:
    assert_served(tmp_path, family, method)


@exhaustive
@pytest.mark.parametrize("family", ["Gemma2", "Cohere", "Mixtral"])
def test_layers_are_listened_to_when_they_are_compiled(tmp_path: Path, family: str) -> None:
    """And when what was compiled is loaded again from the disk, as by the second engine."""
    assert_served(tmp_path, family, "eagle3", enforce_eager=False)
    assert_served(tmp_path, family, "eagle3", enforce_eager=False)


def test_every_class_that_is_listened_to_is_tried() -> None:
    assert {f"{family}ForCausalLM" for family in TARGETS} >= {name.replace("Stablelm", "StableLm") for name in LISTENED}
