"""A run that works and is no use says so once."""

from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests.engine.engines import engine, generate, trees
from vllm_eagle.engine.v1 import runner
from vllm_eagle.metrics import usefulness
from vllm_eagle.metrics.usefulness import FIRST_NODES, Usefulness


def test_it_can_tell_after_some_thousand_nodes() -> None:
    watch = Usefulness()
    steps = FIRST_NODES // 16
    found = [watch.add(16, int(i % 40 == 0)) for i in range(2 * steps)]
    assert [i for i, tau in enumerate(found) if tau is not None] == [steps - 1]
    assert found[steps - 1] == pytest.approx(1 + 1 / 40, abs=0.01)


@pytest.mark.parametrize(("num_nodes", "every"), [(16, 10), (1, 10)])
def test_a_head_that_helps_a_little_is_left_in_peace(num_nodes: int, every: int) -> None:
    watch = Usefulness()
    assert {watch.add(num_nodes, int(i % every == 0)) for i in range(2 * FIRST_NODES)} == {None}


def test_a_head_that_does_not_go_with_the_target_is_named(random_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usefulness, "FIRST_NODES", 512)
    warnings: list[str] = []

    def warning(message: str, *values: Any) -> None:
        warnings.append(message % values)

    monkeypatch.setattr(runner.logger, "warning", warning)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    with engine(random_models["target"], **trees(random_models["eagle"])) as llm:
        generate(llm, [[i, 2 * i, 7] for i in range(4)], params)
    (found,) = [text for text in warnings if "no help" in text]
    assert found.startswith("The head is no help: tau 1.0")
    assert found.endswith(f"vllm-eagle inspect {random_models['eagle']} --target {random_models['target']}")
