"""The simulator: its arithmetic, and what the budget achieves in it."""

import json
from pathlib import Path

import numpy as np
import pytest

from vllm_eagle.bench.recorded.simulate import RECORDED, _recorded, best_fixed, read, roofline, simulate, with_budget
from vllm_eagle.budget.budget import Plan
from vllm_eagle.budget.cost_curve import CostCurve
from vllm_eagle.cli import main

# Root, two children of it, a child of the first: nodes 1, 2, 3; the last one of them was accepted with its parent.
TREE = _recorded([0, 0, 0, 1], [0.0, -0.1, -2.0, -0.5], [1, 3])
H100_8B = {"weight_bytes": 16e9, "flops_per_token": 16e9, "bandwidth": 3.35e12, "flops": 4e14, "overhead_s": 1e-3, "most": 70_000}
HEAD = {"weight_bytes": 1.6e9, "flops_per_token": 1.6e9, "bandwidth": 3.35e12, "flops": 4e14, "overhead_s": 3e-4, "most": 70_000}


def test_a_recorded_tree() -> None:
    assert TREE.depths.tolist() == [1, 1, 2]
    assert TREE.parent_scores.tolist() == [0.0, 0.0, -0.1]
    assert TREE.rows(3).tolist() == [1, 0]
    assert TREE.drafted(2, Plan(2)).tolist() == [0, 1, 2]
    assert TREE.drafted(1, Plan(2)).tolist() == TREE.drafted(2, Plan(2, node_floor=-0.05)).tolist() == [0, 1]
    assert [TREE.accepted(number, 8) for number in range(4)] == [0, 1, 1, 2]
    assert TREE.accepted(3, 1) == 1


def test_roofline() -> None:
    curve = roofline(**H100_8B)
    assert float(curve(np.array(1))) == pytest.approx(1e-3 + 16 / 3350, rel=1e-6)
    assert float(curve(np.array(4096))) == pytest.approx(1e-3 + 4096 * 16e9 / 4e14, rel=1e-6)


def test_best_fixed_tree_of_one_tree() -> None:
    """Passes cost the same whatever they hold, drafting almost nothing: all nodes, and three tokens a pass."""
    flat, cheap = roofline(1, 0, 1, 1, 0.0, 64), roofline(1, 0, 1e9, 1, 0.0, 64)
    found = best_fixed([TREE], flat, cheap, 1, 3, 2)
    assert (found["nodes"], found["levels"]) == (3, 2)
    assert found["tokens_per_s"] == pytest.approx(3.0, rel=1e-6)
    assert with_budget([TREE], flat, cheap, 1, 3, 2)["tokens_per_s"] == pytest.approx(3.0, rel=0.02)


@pytest.mark.parametrize("overhead", [1e-3, 1e-2])
def test_as_good_as_the_best_fixed_tree_and_never_slower_than_none(overhead: float) -> None:
    """From one request to thousands; what it knows, it has learned on the way."""
    target, head = roofline(**(H100_8B | {"overhead_s": overhead})), roofline(**HEAD)
    found = simulate(read(RECORDED), target, head, [1, 4, 16, 64, 256, 1024, 4096], 16, 8)
    for number, variants in found.items():
        assert variants["budget"]["ratio"] >= 0.95 * variants["best_fixed"]["ratio"], (number, variants)
        assert variants["budget"]["ratio"] >= 0.98, (number, variants)
    nodes = [variants["budget"]["nodes"] for variants in found.values()]
    assert nodes[0] > 4 * nodes[-1]


@pytest.mark.parametrize(("hidden_s", "noise"), [(0.0025, 0.1), (0.005, 0.0), (0.005, 0.1)])
def test_never_slower_than_plain_decoding_where_drafts_cost_more_than_is_known(hidden_s: float, noise: float) -> None:
    """A pass with drafts takes some milliseconds longer than its size tells, and times vary: around break-even, too."""
    target = CostCurve([1, 4, 8, 16, 32, 64, 128], [0.0143, 0.017, 0.0175, 0.022, 0.034, 0.056, 0.110])
    head = CostCurve([1, 8, 64, 512], [0.0006, 0.0008, 0.0022, 0.0166])
    trees = read(RECORDED)
    for number in (1, 12, 20, 32):
        plain = number / float(target(np.array(number)))
        found = with_budget(trees, target, head, number, 16, 8, hidden_s, noise=noise)
        assert found["tokens_per_s"] >= 0.99 * plain, (number, found)
        assert number > 1 or found["tokens_per_s"] > 1.9 * plain


@pytest.mark.parametrize("number", [4, 16, 32])
def test_a_machine_that_is_slower_now_and_then_changes_no_decisions(number: int) -> None:
    """Other work takes a share of it for some time, again and again: all passes take longer by that share."""
    target = CostCurve([1, 4, 8, 16, 32, 64, 128], [0.066, 0.066, 0.077, 0.094, 0.143, 0.219, 0.553])
    head = CostCurve([1, 8, 64, 256], [0.0027, 0.0032, 0.0054, 0.0132])
    generator, slowness = np.random.default_rng(0), list[float]()
    while len(slowness) < 1200:
        slowness += [float(np.exp(0.3 * abs(generator.normal())))] * int(1 + generator.exponential(60))
    load = [number] * 1200
    quiet, disturbed = (
        with_budget(read(RECORDED), target, head, load, 16, 8, 0.006, noise=noise, slowness=slow)["tokens_per_s"]
        for noise, slow in ((0.0, None), (0.1, slowness))
    )
    assert disturbed >= 0.98 * quiet >= 0.98 * number / float(target(np.array(number)))


@pytest.mark.parametrize(("before", "now", "at_least"), [(1, 64, 0.93), (64, 1, 1.5), (2, 16, 0.98)])
def test_what_drafts_cost_is_found_out_anew_when_the_load_changes(before: int, now: int, at_least: float) -> None:
    """Every tree makes a pass longer by something that its size does not tell: little for one request, too much for many.

    With 64 it makes the pass five times as long; what is lost until that is known counts in.
    """
    target = CostCurve([1, 64, 256, 1024], [0.007, 0.008, 0.012, 0.030])
    head = CostCurve([1, 64, 1024], [0.0003, 0.0004, 0.003])
    loads = [before] * 400 + [now] * 400
    found = with_budget(read(RECORDED), target, head, loads, 16, 8, 0.0003, hidden_tree_s=0.0005)
    assert found["tokens_per_s"] >= at_least * now / float(target(np.array(now))), found


@pytest.mark.parametrize(("number", "share"), [(1, 0.0), (8, 0.0), (8, 0.6), (16, 0.8)])
def test_what_is_accepted_is_found_out_anew_when_texts_change(number: int, share: float) -> None:
    """Walks go on with that probability for some time: little is lost then, and nothing is lost for good."""
    target = CostCurve([1, 4, 8, 16, 32, 64, 128], [0.0143, 0.017, 0.0175, 0.022, 0.034, 0.056, 0.110])
    head = CostCurve([1, 8, 64, 512], [0.0006, 0.0008, 0.0022, 0.0166])

    def rate(goes_on: list[float]) -> float:
        return with_budget(read(RECORDED), target, head, [number] * len(goes_on), 16, 8, goes_on=goes_on)["tokens_per_s"]

    good, bad = [1.0] * 600, [share] * 600
    assert rate([*good, *bad]) >= (0.9 if number == 1 else 0.97) * number / float(target(np.array(number)))
    assert rate([*good, *bad, *good, *good]) >= 0.95 * rate([*good, *good, *good, *good])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curve = tmp_path / "curve.json"
    curve.write_text(json.dumps({"target": [[1, 0.02], [64, 0.08]], "head": [[1, 0.001], [64, 0.002]]}))
    assert main(["simulate", "--curve", str(curve), "--requests", "1", "8", "--out", str(tmp_path / "out")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["requests"]) == ["1", "8"]
    assert result["requests"]["1"]["budget"]["ratio"] > 1.2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"simulation.json", "simulation.md", "simulation.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--curve", "missing.json"], "--curve missing.json"),
        (["--trees", "missing.json"], "is no recording of trees"),
        (["--bandwidth", "0"], "must be positive"),
        (["--out", __file__], "is no folder"),
        (["--num-draft-tokens", "65"], "have 64 nodes, and what more would bring is not known; use at most 64, or --trees"),
    ],
)
def test_bad_input(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *options]) == 2
    assert message in capsys.readouterr().err


def test_as_many_nodes_as_were_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--num-draft-tokens", "64", "--requests", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]["num_draft_tokens"] == 64
