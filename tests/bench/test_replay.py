"""`vllm-eagle bench --replay`: acceptance is that of the recording, whoever drafts, and answers are those of plain decoding."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiers import exhaustive
from vllm_eagle.bench.recorded import replay
from vllm_eagle.bench.recorded.replay import NUM_CLASSES, NUM_RANKS, profile
from vllm_eagle.cli import main


def test_positions_of_a_tree(tmp_path: Path) -> None:
    """Root: two children, the second right. That one: one child, wrong. Its child has none, so nothing is known of it."""
    half = float(np.log(0.5))
    tree = {"parents": [0, 0, 0, 2], "scores": [0.0, half, 2 * half, 3 * half], "path": [2]}
    found = replay._positions(**tree)
    assert [rank for _, rank in found] == [1, NUM_RANKS]
    assert np.allclose(found[0][0][:3], [0.5, 0.25, 0.0])
    assert np.allclose(found[1][0][:2], [0.5, 0.0])
    file = tmp_path / "trees.json"
    file.write_text(json.dumps({"trees": [tree] * NUM_CLASSES}))
    accepted = np.array(profile(file).accepted)
    assert accepted.shape == (NUM_CLASSES, NUM_RANKS)
    assert accepted.sum() == pytest.approx(NUM_CLASSES / 2)


def test_what_was_recorded() -> None:
    """The surer the head, the more often right; and a chain's tau is near what the pair reached."""
    found = profile()
    first = [ranks[0] for ranks in found.accepted]
    assert first[-1] > 0.9 > 0.5 > first[0]
    assert all(sum(ranks) <= 1.001 for ranks in (*found.accepted, *found.probabilities))
    assert 2.0 < found.expected_tau(3) < 3.5


def test_draws_are_even_and_as_recorded() -> None:
    from vllm_eagle.bench.recorded.replay_models import draw

    which, uniform = draw(torch.arange(40_000))
    assert torch.bincount(which, minlength=NUM_CLASSES).float().div(40_000 / NUM_CLASSES).sub(1).abs().max() < 0.05
    for each in range(NUM_CLASSES):
        assert abs(float(uniform[which == each].mean()) - 0.5) < 0.02
    assert 0 <= float(uniform.min()) < float(uniform.max()) < 1


@exhaustive
def test_on_the_clock(capsys: pytest.CaptureFixture[str]) -> None:
    """vLLM's chain and our trees answer as plain decoding does, and are as often right as the recording says."""
    command = ["bench", "--replay", "tiny", "--only", "vllm_chain3", "fixed", "--concurrency", "4", "--rounds", "1"]
    assert main([*command, "--max-tokens", "160", "--enforce-eager", "--threads", "1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    column = found["concurrency"]["4"]
    assert column["vllm_chain3"]["identical"] == column["fixed"]["identical"] == column["fixed"]["answers"] > 0
    # Positions 100 to 400 of one draw, so the mean is its own, a little off the recording's.
    assert column["vllm_chain3"]["tau"] == pytest.approx(profile().expected_tau(3), rel=0.1)
    assert column["fixed"]["tau"] > column["vllm_chain3"]["tau"]
    assert found["settings"]["replay"] == "tiny"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--replay", "70b"], "--replay 70b: unknown; known: 8b, tiny"),
        (["--replay", "8b", "--temperature", "1"], "remove --temperature"),
        (["--replay", "8b", "--model", "x", "--head", "y"], "remove --real, --model and --head"),
    ],
)
def test_refused(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options]) == 2
    assert says in capsys.readouterr().err
