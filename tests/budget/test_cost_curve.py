"""The cost curve: what it makes of passes that take longer, in which way ever."""

import numpy as np
import pytest

from vllm_eagle.budget.cost_curve import CostCurve


def test_a_curve_goes_through_its_points_and_on() -> None:
    curve = CostCurve([1, 4, 16], [1.0, 2.0, 6.0])
    np.testing.assert_allclose(curve(np.array([1, 4, 10, 16, 19])), [1, 2, 4, 6, 7])


def test_a_curve_never_falls() -> None:
    assert (np.diff(CostCurve([1, 2, 4, 8], [1.0, 0.9, 1.5, 1.2])(np.arange(1, 20))) >= 0).all()


def test_a_curve_follows_what_passes_take() -> None:
    curve = CostCurve([1, 4, 16], [1.0, 2.0, 6.0])
    for _ in range(400):
        curve.correct(10, 8.0)
        curve.correct(1, 1.0)
    np.testing.assert_allclose(curve(np.array([10, 1])), [8.0, 1.0], rtol=0.02)


def test_a_disturbed_pass_changes_little_and_is_soon_forgotten() -> None:
    curve = CostCurve([1, 16], [1.0, 6.0])
    for _ in range(20):
        curve.correct(16, 6.0)
    curve.correct(16, 600.0)
    assert float(curve(np.array(16))) < 7.6
    for _ in range(20):
        curve.correct(16, 6.0)
    assert float(curve(np.array(16))) == pytest.approx(6.0, rel=0.03)


def test_what_all_passes_have_in_common_is_learned_at_once() -> None:
    """Real passes take 20 ms more than those measured at start."""
    curve = CostCurve([1, 4, 16, 64], [0.018, 0.018, 0.030, 0.074])
    for _ in range(4):
        for tokens, seconds in ((4, 0.038), (16, 0.050)):
            curve.correct(tokens, seconds)
    np.testing.assert_allclose(curve(np.array([4, 16, 64])), [0.038, 0.050, 0.094], rtol=0.15)


def test_a_point_that_was_disturbed_when_it_was_measured_and_is_never_met_does_no_harm() -> None:
    """At the start other processes held the cores: a small pass seemed to take thirty times as long."""
    curve = CostCurve([1, 2, 4, 8, 16, 32], [0.055, 0.055, 0.056, 0.055, 0.055, 0.060])
    for _ in range(200):
        for tokens in (3, 5, 12):
            curve.correct(tokens, 0.002)
    np.testing.assert_allclose(curve(np.array([1, 2, 4, 8])), 0.002, rtol=0.3)
    assert (curve(np.arange(1, 40)) > 0).all()


@pytest.mark.parametrize(
    ("tokens", "seconds"), [([], []), ([1, 2], [1.0]), ([2, 2], [1.0, 1.0]), ([2, 1], [1.0, 1.0]), ([1, 2], [1.0, 0.0])]
)
def test_impossible_curves(tokens: list[int], seconds: list[float]) -> None:
    with pytest.raises(ValueError, match="cost curve"):
        CostCurve(tokens, seconds)


def test_where_all_becomes_slower_all_sizes_are_known_to() -> None:
    """Other processes on the same cores: seen of passes of one size, believed of all, and not put down to drafts."""
    curve = CostCurve([1, 16, 64], [0.080, 0.120, 0.300])
    for _ in range(50):
        curve.correct(16, 0.120)
        curve.correct(48, 0.240, num_trees=1)
    for _ in range(30):
        curve.correct(48, 0.360, num_trees=1)
    np.testing.assert_allclose(curve(np.array([1, 16, 64])), [0.120, 0.180, 0.450], rtol=0.1)
    assert float(curve.drafts_s(np.array(1))) < 0.012


def test_what_drafts_take_besides_is_told_from_what_more_tokens_cost() -> None:
    curve = CostCurve([1, 16, 64], [0.080, 0.120, 0.300])
    for step in range(800):
        curve.correct(32, 0.200, num_trees=1)
        if step % 4 == 0:  # plain decoding is looked at now and then
            curve.correct(*((16, 0.120) if step % 8 else (32, 0.180)))
    assert float(curve.drafts_s(np.array(1))) == pytest.approx(0.020, abs=0.003)
    np.testing.assert_allclose(curve(np.array([16, 32])), [0.120, 0.180], rtol=0.03)


def test_what_a_pass_with_drafts_takes_and_what_each_tree_of_it() -> None:
    """As soon as another number of trees is met; until then either may be."""
    curve = CostCurve([1, 64, 256], [0.007, 0.008, 0.012])
    for _ in range(200):
        curve.correct(1, 0.007)
        curve.correct(10, 0.008 + 0.001, num_trees=1)
    for _ in range(20):
        curve.correct(64, 0.008)
        curve.correct(128, 0.0093 + 0.0005 + 64 * 0.0005, num_trees=64)
    np.testing.assert_allclose(curve.drafts_s(np.array([0, 64])), [0.0, 0.0325], rtol=0.2)


def test_the_longer_there_were_no_drafts_the_more_the_next_ones_tell() -> None:
    def corrected(passes_between: int) -> float:
        curve = CostCurve([1, 16], [0.02, 0.06])
        for _ in range(50):
            curve.correct(4, 0.08, num_trees=1)
            curve.correct(4, 0.03)
        before = float(curve.drafts_s(np.array(1)))
        assert 0.03 < before < 0.06
        for _ in range(passes_between):
            curve.correct(4, 0.03)
        left = float(curve.drafts_s(np.array(1)))
        assert left == pytest.approx(before * 0.999**passes_between, abs=0.003)
        curve.correct(4, 0.03 + left / 2, num_trees=1)
        return 1 - float(curve.drafts_s(np.array(1))) / left

    assert corrected(700) > 2 * corrected(10)


def test_sizes_beyond_those_measured() -> None:
    curve = CostCurve([1, 4], [1.0, 1.6])
    for _ in range(100):
        curve.correct(8, 3.0)
        curve.correct(1, 1.0)
    np.testing.assert_allclose(curve(np.array([1, 8])), [1.0, 3.0], rtol=0.05)


def test_a_single_point() -> None:
    """Where a pass is so slow that no second size was measured."""
    curve = CostCurve([2], [1.0])
    for _ in range(40):
        curve.correct(2, 1.5)
    np.testing.assert_allclose(curve(np.array([1, 2, 4])), [1.5, 1.5, 3.0], rtol=0.02)
