"""Targets with M-RoPE that see pictures, in the V2 runner: positions of nodes in three rows, on the device."""

from pathlib import Path

import pytest

from tests.engine import pictures
from tests.engine.test_targets import knowing_head
from tests.engine.v2.bed import Bed, Case
from tests.tiers import interpreted
from vllm_eagle.bench.engines.drafters import ours

PARAMS = [{"temperature": float(i % 2), "seed": i, "max_tokens": 24, "ignore_eos": True, "detokenize": False} for i in range(4)]


@interpreted
@pytest.mark.parametrize("family", ["Qwen2_5_VL", "Qwen3VL"])
def test_trees_are_exact_behind_pictures(bed: Bed, family: str, tmp_path: Path) -> None:
    target, head = pictures.random_target(tmp_path / "target", family), knowing_head(tmp_path / "head", pictures.VOCAB)
    plain = Case(str(target), [], PARAMS, engine=pictures.OPTIONS, pictures=family)
    engine = pictures.OPTIONS | ours(str(head), 8, budget=False)
    expected, found = bed.run(plain), bed.run(Case(str(target), [], PARAMS, engine=engine, pictures=family, is_async=True))
    print(family, found.stats["tau"], found.stats["num_moved"])
    assert found.token_ids == expected.token_ids
    assert found.stats["num_moved"] > 0  # branches off the first child were accepted
