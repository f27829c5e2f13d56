"""What `vllm-eagle bench` makes of what it measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_eagle.bench import throughput_report
from vllm_eagle.bench.offline import Generated
from vllm_eagle.bench.throughput import PLAIN, Settings, _asks, _summary, measure, run, variants
from vllm_eagle.pair import HEAD, TARGET


def settings(**changes: Any) -> Settings:
    usual = {
        "model": str(TARGET),
        "head": str(HEAD),
        "prompts": None,
        "temperature": 0.0,
        "seed": 0,
        "max_tokens": 8,
        "dtype": "float32",
        "concurrency": (1,),
        "rounds": 1,
        "num_draft_tokens": 16,
        "only": None,
        "threads": None,
    }
    return Settings(**(usual | changes))  # type: ignore[arg-type]


def generated(seconds: float, last: int = 3) -> Generated:
    return Generated([[1, 2, last]], ["x"], seconds, 2.0, [0.1], [0.01])


def test_ratios_are_taken_within_a_round() -> None:
    """The machine was slow in the second round, for both."""
    rounds = [
        {PLAIN: generated(2.0), "trees": generated(1.0)},
        {PLAIN: generated(20.0), "trees": generated(8.0)},
        {PLAIN: generated(2.0), "trees": generated(1.0, last=4)},
    ]
    found = _summary(rounds, "trees")
    assert found["ratios"] == [2.0, 2.5, 2.0]
    assert found["ratio"] == 2.0
    assert found["tokens_per_s"] == 3.0
    assert (found["identical"], found["answers"]) == (2, 3)
    assert found["next_token_ms"]["p50"] == 10.0


def test_a_report_is_written(tmp_path: Path) -> None:
    column = {name: _summary([{PLAIN: generated(2.0), "trees": generated(1.0)}], name) for name in (PLAIN, "trees")}
    result = {
        "concurrency": {"1": column, "8": column},
        "settings": {"dtype": "float32"},
        "cores": 2,
        "memory_mib": {PLAIN: 900, "trees": 1000},
    }
    throughput_report.write(result, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == result
    text = (tmp_path / "out" / "bench.md").read_text()
    assert "| trees | 3.0 (2.00x, tau 2.00) | 3.0 (2.00x, tau 2.00) |" in text
    assert (tmp_path / "out" / "bench.png").stat().st_size > 5000


def test_every_round_asks_something_else() -> None:
    prompts = [[i] for i in range(100)]
    first, second = (_asks(settings(concurrency=(5,)), prompts, 5, turn) for turn in (0, 1))
    assert len(first) == len(second) == 20
    assert not {ask.prompt_token_ids[0] for ask in first} & {ask.prompt_token_ids[0] for ask in second}
    assert len({ask.seed for ask in first + second}) == 40


@pytest.mark.parametrize("http", [False, True], ids=["offline", "http"])
def test_measured(http: bool) -> None:
    """Engines in processes of their own, on a model for which times mean nothing; answers do."""
    chosen = settings(max_tokens=20, concurrency=(3,), rounds=2, temperature=1.0, only=["trees"], http=http, enforce_eager=True)
    prompts = [list(range(10 + i, 40 + i)) for i in range(8)]
    saved: list[list[str]] = []
    result = measure(chosen, prompts, variants(chosen), lambda found: saved.append(list(found["concurrency"])))
    assert saved == [["3"]]  # a run that is cut short leaves what it has
    found = result["concurrency"]["3"]["trees"]
    assert (found["identical"], found["answers"]) == (24, 24)
    assert found["tau"] > 1.0
    assert found["tokens_per_s"] > 0
    assert result["memory_mib"]["trees"] > 100
    assert (found["gap_ms"] is not None) == http
    assert "24 of 24" in throughput_report.details(result)


def test_plain_vllm_is_always_there() -> None:
    assert list(variants(settings(only=["trees"]))) == [PLAIN, "trees"]
    assert list(variants(settings(only=["fixed4", "trees"]))) == [PLAIN, "trees", "fixed4"]
    assert "fixed4" not in variants(settings())  # a sweep is asked for
    assert variants(settings())["trees"]["additional_config"] == {"vllm_eagle": {}}  # the defaults


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": ["tree7"]}, "unknown variant tree7; known: plain, vllm_chain1"),
        ({"concurrency": (0,)}, "--concurrency and --rounds must be at least 1"),
        ({"max_tokens": 1}, "--max-tokens at least 2"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(settings(**changes), None)


def test_out_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(ValueError, match="is no folder"):
        run(settings(), tmp_path / "x")
