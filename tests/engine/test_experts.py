"""Mixtures of experts: what a pass costs depends on how many experts its tokens ask for, and so must what is measured at start."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import LLM, SamplingParams

from tests.engine.engines import engine, generate, tokens, trees
from tests.engine.families import PROMPTS, model_of
from tests.engine.test_targets import knowing_head
from tests.tiers import exhaustive

EXPERTS, TOPK = 16, 2
FAMILIES = {"Mixtral": {"num_local_experts": EXPERTS}, "Qwen3Moe": {"num_experts": EXPERTS}, "Qwen2Moe": {"num_experts": EXPERTS}}
SIZES = (1, 2, 4, 8, 16, 32)


@contextmanager
def experts(llm: LLM, found: dict[int, list[int]]) -> Iterator[None]:
    """Collects in `found`, by the number of tokens in a pass, how many experts of each layer these ask for."""

    def count(_module: Any, _inputs: Any, output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        found[len(logits)].append(len(logits.topk(TOPK).indices.unique()))

    def listen(worker: Any) -> list[Any]:
        modules = worker.model_runner.get_model().named_modules()
        return [module.register_forward_hook(count) for name, module in modules if name.endswith((".mlp.gate", "moe.gate"))]

    [handles] = llm.collective_rpc(listen)
    assert len(handles) == 4  # one per layer
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@exhaustive
@pytest.mark.parametrize("family", FAMILIES)
def test_passes_that_are_measured_ask_for_as_many_experts_as_those_of_text(family: str, tmp_path: Path) -> None:
    model_of(family, **FAMILIES[family]).save_pretrained(tmp_path / "target")
    head = knowing_head(tmp_path / "head")
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=48, ignore_eos=True, detokenize=False)
    one = params.clone()
    one.max_tokens = 1
    options = {"skip_tokenizer_init": True, "enable_prefix_caching": False} | trees(head, 16, budget=True)
    measured, of_text = defaultdict(list), defaultdict(list)
    with engine(tmp_path / "target", **options) as llm:
        texts = [prompt + reply for prompt, [reply] in zip(PROMPTS, tokens(generate(llm, PROMPTS, params)), strict=True)]
        with experts(llm, measured):
            llm.collective_rpc(lambda worker: worker.model_runner.measure_costs())
        with experts(llm, of_text):
            for size in SIZES:
                for text in texts:
                    generate(llm, [text[-size:]], one)
    means = [(np.mean(measured[size]), np.mean(of_text[size])) for size in SIZES]
    print(family, *(f"{size}: {one:.1f} {other:.1f}" for size, (one, other) in zip(SIZES, means, strict=True)))
    assert means[0] == (TOPK, TOPK)
    assert means[-1][0] > EXPERTS / 2
    for one_mean, other_mean in means:
        assert 0.7 * other_mean < one_mean < 1.8 * other_mean  # tokens of a text are alike, those that are drawn are not
