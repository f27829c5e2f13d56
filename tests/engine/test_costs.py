"""What passes cost is measured at start-up, in reasonable time."""

from types import SimpleNamespace

import numpy as np
import pytest

from vllm_eagle.engine import costs
from vllm_eagle.engine.v1 import clock as step_clock
from vllm_eagle.metrics.counters import TreeMetrics


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """One that goes by what passes say."""
    now = SimpleNamespace(s=0.0)
    for module in (costs, step_clock):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now.s))
    monkeypatch.setattr(costs, "agree", list)  # alone
    return now


def test_the_fastest_of_some_rounds_counts(clock: SimpleNamespace) -> None:
    passes: list[int] = []

    def run(tokens: int) -> None:
        clock.s += 0.001 * tokens * (3 if len(passes) % 3 else 1)  # two of three are disturbed
        passes.append(tokens)

    curve = costs.measure(run, 100)
    assert [tokens for tokens, _ in curve.points] == [1, 2, 4, 8, 16, 32, 64]
    np.testing.assert_allclose([seconds for _, seconds in curve.points], 0.001 * 2.0 ** np.arange(7))


def test_a_large_model_does_not_hold_up_the_start(clock: SimpleNamespace) -> None:
    """Passes of seconds each: twice for each size, and no larger ones than a tree for one request needs."""
    passes: list[int] = []

    def run(tokens: int) -> None:
        clock.s += 5 + 0.1 * tokens
        passes.append(tokens)

    curve = costs.measure(run, 4096)
    assert passes == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16]
    assert [tokens for tokens, _ in curve.points] == [1, 2, 4, 8, 16]


def test_a_start_that_was_disturbed_still_has_a_curve(clock: SimpleNamespace) -> None:
    """One pass alone would say that every token costs as much as the first."""

    def run(tokens: int) -> None:
        clock.s += 0.9 if tokens == 1 else 0.02

    curve = costs.measure(run, 64)
    assert [tokens for tokens, _ in curve.points] == [1, 2, 4, 8, 16, 32, 64]
    np.testing.assert_allclose([seconds for _, seconds in curve.points], 0.02)


def test_a_step_without_work_does_not_hide_what_drafting_took(clock: SimpleNamespace) -> None:
    """vLLM runs one after the last request has ended."""
    metrics = TreeMetrics()
    steps = step_clock.StepClock(metrics)
    for pass_s, draft_s in ((0.3, 0.1), (None, None), (0.5, 0.2)):
        steps.start_step()
        if pass_s is None:
            continue
        metrics.add_seconds("verify", pass_s)
        found = steps.read()
        metrics.add_seconds("draft", draft_s)
        steps.end_step()
        clock.s += 1.0
    np.testing.assert_allclose(found, [0.0, 0.5, 0.1])
    steps.start_step()
    np.testing.assert_allclose(steps.read(), [1.0, 0.0, 0.2])
