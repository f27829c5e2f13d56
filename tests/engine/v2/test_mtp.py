"""MTP modules in V2, as in V1 (tests/engine/test_mtp.py)."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.test_mtp import CHAINS, MODULES, TREES, target_with_module
from tests.engine.v2.bed import Bed, Case
from tests.tiers import interpreted


@interpreted
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("knows", [True, False])
def test_trees_of_a_module_are_exact(bed: Bed, name: str, knows: bool, tmp_path: Path) -> None:
    """Of a target that its module knows, of whose greedy chains hardly a node is rejected, and of one that it half knows, so that
    branches are accepted; greedy and sampled.
    """
    target = target_with_module(tmp_path / "target", name, knows)
    prompts = [[3 + (7 * i + 5 * j) % 250 for j in range(length)] for i, length in enumerate((5, 70, 33))]
    params = [{"temperature": 0 if knows else i % 2, "seed": i, "max_tokens": 24, "ignore_eos": True} for i in range(3)]
    asked = Case(str(target), prompts, [each | {"detokenize": False} for each in params], engine={"skip_tokenizer_init": True})
    expected = bed.run(asked)
    found = bed.run(replace(asked, engine=asked.engine | (CHAINS if knows else TREES), is_async=True))
    assert found.token_ids == expected.token_ids
    assert found.stats["tau"] > (4.0 if knows else 1.1)
    assert knows or found.stats["num_moved"] > 0
