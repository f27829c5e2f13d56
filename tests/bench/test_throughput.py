"""What `vllm-eagle bench` makes of what it measured."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from vllm.v1.metrics.stats import IterationStats

from tests.tiers import exhaustive
from vllm_eagle.bench.engines.offline import Generated
from vllm_eagle.bench.speed import report, sides, sustained, throughput
from vllm_eagle.bench.speed.output_gaps import output_gaps
from vllm_eagle.bench.speed.throughput import PLAIN, Settings, _asks, _summary, measure, order, run, variants
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
    assert found["answer_tokens_per_s"] == 100.0


def measured(dtype: str = "float32", **last: int) -> dict[str, Any]:
    """A result as JSON; `last` has the last token of an answer by variant, where it is not plain vLLM's."""
    rounds = [{name: generated(2.0 - i, last.get(name, 3)) for i, name in enumerate((PLAIN, "trees"))}]
    rounds[0]["vllm_chain3"] = generated(1.0, last.get("vllm_chain3", 3))
    column = {name: _summary(rounds, name) for name in rounds[0]}
    return {
        "concurrency": {"1": column, "8": column},
        "settings": {"model": "m", "head": "h", "prompts": "built in", "concurrency": [1, 8], "dtype": dtype, "temperature": 0.0}
        | {"http": True, "enforce_eager": False, "replay": None, "prefix_caching": False},
        "cores": 2,
        "machine": "Some CPU",
        "versions": {"vllm": "0.32.0", "torch": "2.11"},
        "host_mib": {PLAIN: 900, "trees": 1000},
        "device_mib": None,
        "note": None,
    }


def test_a_report_is_written(tmp_path: Path) -> None:
    result = measured()
    report.write(result, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == result
    text = (tmp_path / "out" / "bench.md").read_text()
    assert "| trees | 3.0 (2.00x, tau 2.00) | 3.0 (2.00x, tau 2.00) |" in text
    assert (tmp_path / "out" / "bench.png").stat().st_size > 5000
    assert text.splitlines()[:6] == [
        "- Machine: Some CPU, 2 cores",
        "- Versions: vllm 0.32.0, torch 2.11",
        "- dtype: float32",
        "- Options of `vllm-eagle bench`: `--model m --head h --concurrency 1 8 --dtype float32 --temperature 0.0 --http`",
        "- Prefix caching: off, for all alike",
        "- Host memory, MiB: plain 900, trees 1000",
    ]
    on_gpu = report.conditions(result | {"device_mib": {PLAIN: 30_000}})
    assert on_gpu.endswith("- GPU memory, KV cache included, MiB: plain 30000")


@pytest.mark.parametrize(
    ("result", "status", "lines"),
    [
        (measured(), 0, []),
        (measured(trees=4), 1, ["trees: 2 of 2 answers differ from plain vLLM's (FAIL: greedy answers in float32 must not)"]),
        (measured("bfloat16", trees=4), 0, ["trees: 2 of 2 answers differ from plain vLLM's (no failure here)"]),
        (measured(vllm_chain3=4), 0, ["vllm_chain3: 2 of 2 answers differ from plain vLLM's (no failure here)"]),
    ],
    ids=["identical", "float32", "bfloat16", "of_vllm"],
)
def test_answers_that_differ_fail_the_run_only_where_they_must_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], result: dict[str, Any], status: int, lines: list[str]
) -> None:
    monkeypatch.setattr(throughput, "measure", lambda *_: result)
    monkeypatch.setattr(throughput, "encode_prompts", lambda *_, **__: [])
    assert run(settings(), None) == status
    told = capsys.readouterr().out.splitlines()
    assert [line for line in told if "differ" in line] == lines
    assert json.loads(told[-1]) == result


def test_sampled_answers_may_differ() -> None:
    result = measured(trees=4)
    result["settings"]["temperature"] = 1.0
    assert not report.is_wrong(result)


def test_nobody_always_follows_the_same_one() -> None:
    assert [order(["a", "b"], turn) for turn in range(4)] == [["a", "b"], ["b", "a"], ["b", "a"], ["a", "b"]]
    names = ["a", "b", "c"]
    assert {tuple(order(names, turn)) for turn in range(6)} == {
        *(("a", "b", "c"), ("c", "b", "a"), ("b", "c", "a")),
        *(("a", "c", "b"), ("c", "a", "b"), ("b", "a", "c")),
    }
    follows = {pair for turn in range(2) for pair in pairwise(order(names, turn))}
    assert follows == {("a", "b"), ("b", "c"), ("c", "b"), ("b", "a")}


def test_tokens_and_gaps_between_outputs_are_those_of_the_engines_steps() -> None:
    """Of the steps within the context: two requests in the first, none in the second, one in the third."""
    others: list[Any] = [object()]
    llm: Any = SimpleNamespace(llm_engine=SimpleNamespace(logger_manager=SimpleNamespace(stat_loggers=others)))
    with output_gaps(llm) as told:
        assert len(others) == 2
        for seconds in ([0.1, 0.2], None, [0.3]):
            stats = None if seconds is None else IterationStats()
            if stats is not None:
                stats.inter_token_latencies_iter += seconds
                stats.num_generation_tokens = 4
            others[-1].record(None, stats, mm_cache_stats=None, engine_idx=0)
    assert told.seconds == [0.1, 0.2, 0.3]
    assert told.num_tokens == 8
    assert len(others) == 1


def test_memory_of_processes_that_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper of a server ends while it is looked at; then the server does."""
    own = sides.host_bytes(os.getpid(), with_children=False)
    assert own > 1 << 20

    class Ended:
        def memory_info(self) -> None:
            raise psutil.NoSuchProcess(1)

    monkeypatch.setattr(psutil.Process, "children", lambda *_, **__: [Ended(), psutil.Process()])
    assert sides.host_bytes(os.getpid(), with_children=True) == pytest.approx(2 * own, rel=0.1)
    assert sides.host_bytes(1 << 30, with_children=True) == 0


@pytest.mark.parametrize("on_gpu", [False, True])
def test_every_side_gets_the_same_and_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], on_gpu: bool
) -> None:
    """Without engines: none may keep prompts, rounds are shown as they end, and what a side took of the GPU is its own."""
    started: list[dict[str, Any]] = []

    @contextmanager
    def start(model: str, arguments: dict[str, Any]) -> Iterator[sides.Side]:
        started.append(arguments)
        yield lambda asks, _: Generated([[1, 2, 3]] * len(asks), ["x"] * len(asks), 1.0, 1.0, [0.1], [0.01]), lambda: 3 << 20

    monkeypatch.setattr(throughput, "engine_side", start)
    monkeypatch.setattr(throughput, "_SETTLE_S", 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: ((80 - (1 + len(started)) ** 2) << 30, 80 << 30))
    chosen = settings(only=["trees"], rounds=2, concurrency=(1, 4))
    result = measure(chosen, [[1, 2]], variants(chosen))
    assert [each["enable_prefix_caching"] for each in started] == [False, False]
    assert result["settings"]["prefix_caching"] is False
    assert result["host_mib"] == {PLAIN: 3, "trees": 3}
    assert result["device_mib"] == ({PLAIN: 3 << 10, "trees": 5 << 10} if on_gpu else None)
    assert capsys.readouterr().err.splitlines()[2:] == [
        f"{what}: plain {rate}.0 tokens/s (1.00x)  trees {rate}.0 tokens/s (1.00x)"
        for what, rate in (
            *(("1 at once, round 1 of 2", 24), ("1 at once, round 2 of 2", 24), ("1 at once, medians", 24)),
            *(("4 at once, round 1 of 2", 48), ("4 at once, round 2 of 2", 48), ("4 at once, medians", 48)),
        )
    ]


def test_every_round_asks_something_else() -> None:
    prompts = [[i] for i in range(100)]
    first, second = (_asks(settings(concurrency=(5,)), prompts, 5, turn) for turn in (0, 1))
    assert len(first) == len(second) == 20
    assert not {ask.prompt_token_ids[0] for ask in first} & {ask.prompt_token_ids[0] for ask in second}
    assert len({ask.seed for ask in first + second}) == 40


def test_users_are_not_in_step() -> None:
    asked = _asks(settings(max_tokens=10), [[1]], 4, 1)
    assert [ask.max_tokens for ask in asked] == [3, 5, 8, *[10] * 13]
    assert {ask.max_tokens for ask in _asks(settings(max_tokens=10), [[1]], 1, 0)} == {10}


def test_rates_are_those_while_nobody_had_run_out_of_questions() -> None:
    rounds = [{PLAIN: replace(generated(2.0), busy=(2, 1.0)), "trees": replace(generated(2.0), busy=(3, 0.5))}]
    assert _summary(rounds, "trees")["tokens_per_s"] == 6.0
    assert _summary(rounds, "trees")["ratio"] == 3.0


def test_tokens_of_an_answer_over_http_until_some_time() -> None:
    """Three outputs, of two tokens each, as far as can be told: after 1, 1.5 and 3 seconds."""
    answer: Any = SimpleNamespace(ttft=1.0, itl=[0.5, 1.5], output_tokens=6)
    assert [sustained.until(now_s, 10.0, answer) for now_s in (9.0, 11.2, 11.6, 13.5)] == [0, 2, 4, 6]


class Lockstep:
    """An engine that gives every request a token per step."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.all: dict[str, int] = {}
        self.logger_manager = SimpleNamespace(stat_loggers=list[Any]())

    def add_request(self, number: str, _prompt: Any, params: Any) -> None:
        self.left[number] = self.all[number] = params.max_tokens

    def step(self) -> list[Any]:
        stats = IterationStats()
        stats.num_generation_tokens = len(self.left)
        for logger in self.logger_manager.stat_loggers:
            logger.record(None, stats)
        self.left = {number: left - 1 for number, left in self.left.items()}
        ended = [number for number, left in self.left.items() if not left]
        for number in ended:
            del self.left[number]
        metrics = SimpleNamespace(first_token_latency=0.1, last_token_ts=2.0, first_token_ts=1.0)
        return [
            SimpleNamespace(
                request_id=number,
                finished=True,
                metrics=metrics,
                outputs=[SimpleNamespace(token_ids=[0] * self.all[number], text="", spec_decode_metrics=None)],
            )
            for number in ended
        ]


def test_what_comes_after_the_last_question_was_answered_by_somebody_does_not_count() -> None:
    llm: Any = SimpleNamespace(llm_engine=Lockstep())
    found = sustained.offline(llm, [sustained.Ask([1], 0.0, 0, length) for length in (2, 4, 3, 9)], 2)
    assert found.tokens == 18
    assert found.busy is not None
    assert found.busy[0] == 2 * 5  # the third question is answered after 2 + 3 steps, and nobody asks another
    assert 0 < found.busy[1] <= found.seconds


@exhaustive
@pytest.mark.parametrize("http", [False, True], ids=["offline", "http"])
def test_measured(http: bool) -> None:
    """Engines in processes of their own, on a model for which times mean nothing; answers do. No budget: it goes by times."""
    chosen = settings(max_tokens=20, concurrency=(3,), rounds=2, temperature=1.0, only=["fixed"], http=http, enforce_eager=True)
    prompts = [list(range(10 + i, 40 + i)) for i in range(8)]
    saved: list[list[str]] = []
    result = measure(chosen, prompts, variants(chosen), lambda found: saved.append(list(found["concurrency"])))
    assert saved == [["3"]]  # a run that is cut short leaves what it has
    found = result["concurrency"]["3"]["fixed"]
    assert (found["identical"], found["answers"]) == (24, 24)
    assert found["tau"] > 1.0
    assert found["tokens_per_s"] > 0
    assert result["host_mib"]["fixed"] > 100
    # Half of the answers have a gap at least as long as what a token of the median answer takes, and that is more than 1 in 100.
    assert found["gap_ms"]["p99"] >= found["next_token_ms"]["p50"] > 0
    assert result["concurrency"]["3"][PLAIN]["gap_ms"]["p99"] > 0  # on a busy machine most pieces of a stream may come in bunches
    assert "24 of 24" in report.details(result)


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
