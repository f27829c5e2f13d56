"""Targets with sliding windows, capped scores and attention sinks in V2: several groups of caches, blocks that are given back."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.engines import trees
from tests.engine.test_targets import knowing_head
from tests.engine.test_windows import TARGETS, random_target
from tests.engine.v2.bed import Bed, Case
from tests.tiers import interpreted


@interpreted
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("family", TARGETS)
def test_trees_are_exact_behind_windows(bed: Bed, family: str, is_async: bool, tmp_path: Path) -> None:
    """Contexts longer than the window, whose blocks vLLM frees; a prompt shorter than it; greedy and sampled in one batch."""
    target, head = random_target(tmp_path / "target", family), knowing_head(tmp_path / "head")
    prompts = [[3 + (7 * i + 5 * j) % 250 for j in range(length)] for i, length in enumerate((5, 70, 33))]
    params = [{"temperature": i % 2, "seed": i, "max_tokens": 24, "ignore_eos": True, "detokenize": False} for i in range(3)]
    asked = Case(str(target), prompts, params, engine={"skip_tokenizer_init": True})
    expected = bed.run(asked)
    found = bed.run(replace(asked, engine=asked.engine | trees(head, 8), is_async=is_async))
    assert found.token_ids == expected.token_ids
    assert found.stats["num_moved"] > 0  # branches off the first child were accepted
    assert found.stats["tau"] > 1.1
