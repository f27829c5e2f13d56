"""Where the time of a step goes."""

import json

import pytest

from vllm_eagle.bench.speed import steps
from vllm_eagle.bench.speed.steps import Rates, Step, summary
from vllm_eagle.pair import HEAD, TARGET

RATES = Rates(bytes_per_s=1000.0, operations_per_s=4000.0, num_weights=50, weight_bytes=200)


def test_reading_bounds_small_passes_and_multiplying_large_ones() -> None:
    assert RATES.least_s(1) == RATES.least_s(8) == pytest.approx(0.2)
    assert RATES.least_s(16) == pytest.approx(0.4)


def test_parts_add_up() -> None:
    found = summary([Step(0.5, 0.3, 0.1, 8, 3), Step(0.7, 0.5, 0.1, 16, 4)], RATES)
    assert found["step_ms"] == 600
    assert (found["target_ms"], found["head_ms"], found["rest_ms"]) == (400, 100, 100)
    assert found["rest_share"] == pytest.approx(1 / 6, abs=1e-4)
    assert found["target_least_ms"] == 300
    assert (found["tokens_in_pass"], found["tokens_emitted"], found["steps"]) == (12, 3.5, 2)
    with pytest.raises(ValueError, match="--max-tokens"):
        summary([], RATES)


def test_measured(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--concurrency", "1", "3", "--max-tokens", "24", "--threads", "1", "--num-draft-tokens", "4"]
    steps.main(["--model", str(TARGET), "--head", str(HEAD), "--dtype", "float32", "--enforce-eager", *sizes])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for number in ("1", "3"):
        plain, trees = found["steps"]["plain"][number], found["steps"]["trees"][number]
        # A step of plain decoding holds a token per request, and has no head.
        assert (plain["tokens_in_pass"], plain["tokens_emitted"], plain["head_ms"]) == (int(number), int(number), 0)
        assert trees["tokens_in_pass"] >= trees["tokens_emitted"] >= int(number)
        for side in (plain, trees):
            assert side["steps"] > 5
            assert side["target_ms"] > 0
            assert side["rest_ms"] > 0
            assert side["step_ms"] == pytest.approx(side["target_ms"] + side["head_ms"] + side["rest_ms"], abs=0.02)
    assert 10e6 < found["weights"] < 14e6  # of the 13 million, without the input embedding
    assert found["settings"]["threads"] == 1
