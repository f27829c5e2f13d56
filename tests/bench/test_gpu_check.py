"""The part of `vllm-eagle gpu-check` that runs engines: its commands exist, and what fails is seen."""

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from vllm_eagle.algorithm.noise import gumbel, peek_seeds
from vllm_eagle.attention.interface import CUDA_BACKENDS
from vllm_eagle.bench.engines.offline import Generated
from vllm_eagle.bench.gpu import check, engines
from vllm_eagle.bench.gpu.stages import Clock, Result, Stage
from vllm_eagle.bench.gpu.stages import run as run_stages
from vllm_eagle.bench.passes import gaps
from vllm_eagle.bench.passes.compare import variants
from vllm_eagle.bench.speed import alone
from vllm_eagle.bench.speed.throughput import Settings
from vllm_eagle.cli import build_parser, main
from vllm_eagle.commands.arguments import _fill
from vllm_eagle.ops.cases import Case
from vllm_eagle.pair import HEAD

COMMANDS = engines.EXACT | engines.SPEED | engines.EXACT_BESIDES


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_known(name: str) -> None:
    args = build_parser().parse_args(COMMANDS[name])
    if args.run.__name__ == "_compare":
        assert set(args.only) <= variants(str(HEAD), args.temperature).keys()
        assert not any(variant.startswith("vllm_") for variant in args.only)  # whose failures are not ours
        assert args.attention_backend in (None, *CUDA_BACKENDS)
    else:
        assert args.replay == "8b"
        assert (sorted(args.concurrency), args.temperatures) == ([1, 4, 16, 64], [0, 1])
        assert name == f"speed_{args.alone}"


def test_an_engine_is_compared() -> None:
    """A short one of the same kind, on what is here."""
    command = shlex.split("compare --limit 2 --max-tokens 8 --only tree16")
    found = engines.check("exact", command)
    assert found["problem"] is None
    assert found["result"]["identical"] == 2
    assert found["command"] == shlex.join(command)


def test_an_engine_is_asked_at_every_load() -> None:
    """Started once; the other's answers are the same."""
    loads = "--concurrency 1 2 --rounds 1 --max-tokens 8 --temperatures 0 1"
    usual = shlex.split(f"bench --replay tiny --dtype float32 {loads} --alone")
    found = {f"speed_{name}": engines.check(name, [*usual, name]) for name in ("plain", "fixed_uncoupled")}
    assert [each["problem"] for each in found.values()] == [None, None]
    ratios = engines.ratios(found)
    assert list(ratios) == ["T=0, 1 at once", "T=0, 2 at once", "T=1, 1 at once", "T=1, 2 at once"]
    for by_variant in ratios.values():
        found_there = by_variant["fixed_uncoupled"]
        assert found_there["identical"] == found_there["answers"] == 8
        assert found_there["tau"] > 1.5  # with sampling, too


def test_an_engine_is_asked_until_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known is told after every load."""
    now = [0.0]

    def answered(llm: object, asks: Sequence[object], at_once: int) -> Generated:
        now[0] += 10
        return Generated([[at_once]] * len(asks), ["x"] * len(asks), 2.0, 1.5)

    monkeypatch.setattr(alone, "engine", lambda *_, **__: nullcontext())
    monkeypatch.setattr(alone.sustained, "offline", answered)
    monkeypatch.setattr(alone.time, "monotonic", lambda: now[0])
    args = build_parser().parse_args(["bench", "--concurrency", "1", "4", "--rounds", "2", "--max-tokens", "8", "--alone", "plain"])
    told, loads = [], {}
    for each in alone.measure(_fill(Settings, args), [[1, 2]], "plain", {}, [0.0, 1.0], 40.0):
        loads = each["loads"]
        told.append((len(loads), list(each["left_out"])))
    assert told == [
        (0, ["T=0, 1 at once", "T=0, 4 at once", "T=1, 1 at once", "T=1, 4 at once"]),
        (1, ["T=0, 4 at once", "T=1, 1 at once", "T=1, 4 at once"]),
        (2, ["T=1, 1 at once", "T=1, 4 at once"]),
    ]
    assert loads["T=0, 4 at once"]["tokens_per_s"] == 8.0


@pytest.mark.parametrize("command", [("compare", "--only", "none"), ("doctor", "--matrix")])
def test_a_failure_is_seen(command: Sequence[str]) -> None:
    """An error, and a command that prints no JSON."""
    found = engines.check("broken", command)
    assert found["problem"]
    assert found["result"] is None
    assert check._failed({"comparisons": {"right": 0.5, "wrong": 2.0}, "vllm": {"broken": found}}) == ["wrong", "broken"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alone", "trees", "--temperatures", "1"], "take uncoupled for trees"),
        (["--alone", "trees", "--http"], "remove --http"),
        (["--alone", "trees", "--out", "x"], "remove --out"),
        (["--minutes", "1"], "go with --alone"),
        (["--alone", "none"], "unknown variant none"),
    ],
)
def test_what_cannot_be_measured_alone_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--replay", "tiny", *arguments]) == 2
    assert message in capsys.readouterr().err


class Time:
    """A clock that stages move."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def stage(self, name: str, takes_s: float, ran: list[str], least_s: float = 60.0) -> Stage:
        def run(result: Result, seconds: float) -> Iterator[str | None]:
            ran.append(name)
            for _ in range(2):
                self.now_s += min(takes_s, seconds) / 2
                yield None
            if takes_s > seconds:
                yield "time was over"

        return Stage(name, least_s, run)


def test_what_fits_is_done_and_what_does_not_is_named() -> None:
    """Another call does the rest."""
    time, ran = Time(), list[str]()
    result: Result = {}
    stages = [time.stage(name, 100, ran) for name in "abcd"] + [time.stage("short", 5, ran, 5)]

    def call(minutes: float) -> None:
        ran.clear()
        result["left_out"] = {}
        for _ in run_stages(stages, result, Clock(minutes, lambda: time.now_s)):
            pass

    call(4)
    assert ran == result["done"] == ["a", "b", "short"]
    assert set(result["left_out"]) == {"c", "d"}
    assert result["left_out"]["c"] == "40 seconds were left of at least 60"
    call(3)
    assert ran == ["c", "d"]
    assert result["left_out"] == {"d": "time was over"}
    call(3)
    assert ran == ["d"]
    assert result["left_out"] == {}


def test_a_stage_that_dies_is_not_done() -> None:
    result: Result = {}

    def broken(result: Result, seconds: float) -> Iterator[str | None]:
        result["half"] = True
        yield None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run_stages([Stage("broken", 0, broken)], result, Clock(None)))
    assert result == {"half": True, "done": [], "left_out": {"broken": "began, did not end"}}


def test_a_call_goes_on_from_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Only what is not known is compared, with the same seed; results of elsewhere are refused."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "")
    compared: list[str] = []

    def case(name: str) -> Case:
        return Case(name, lambda device, seed: compared.append(f"{name} {seed}") or [(torch.zeros(1), torch.zeros(1))])

    monkeypatch.setattr("vllm_eagle.ops.cases.all_cases", lambda: [case("one"), case("two")])
    path = tmp_path / "result.json"
    command = ["gpu-check", "--interpret", "--seeds", "1", "--json", str(path)]
    path.write_text(json.dumps({"device": "interpreter", "seed": 7, "comparisons": {"one": 3.0}, "done": []}))
    assert main([*command, "--resume", str(path)]) == 1
    assert compared == ["two 7"]
    found = json.loads(path.read_text())
    assert (found["done"], found["failed"], found["left_out"]) == (["kernels"], ["one"], {})
    assert main([*command, "--minutes", "0"]) == 0
    assert json.loads(path.read_text())["left_out"] == {"kernels": "0 seconds were left of at least 30"}
    assert main([*command, "--only", "speed_plain"]) == 2
    path.write_text(json.dumps({"device": "H200"}))
    assert main([*command, "--resume", str(path)]) == 2
    assert "is of H200, this is interpreter" in capsys.readouterr().err


def test_what_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it has started: an engine that goes on would hold the GPU's memory."""
    mark = tmp_path / "mark"
    code = f"import subprocess; subprocess.run(['sh', '-c', 'sleep 4; touch {mark}'])"
    status, _ = engines._run([sys.executable, "-c", code], 1.0)
    assert status is None
    monkeypatch.setattr(engines, "_run", lambda command, most_seconds: (None, '{"known": 1}\n{"cut sh'))
    found = engines.check("slow", ("doctor",), 90)
    assert found["problem"] == "ended after 90 seconds"
    assert found["result"] == {"known": 1}
    time.sleep(4.5)
    assert not mark.exists()


def test_engines_multiply_float32_in_full() -> None:
    """vLLM's Triton attention says nothing of precision, so Triton's default would be TF32."""
    status, printed = engines._run([sys.executable, "-c", "import os; print(os.environ['TRITON_F32_DEFAULT'])"], 60)
    assert (status, printed) == (0, "ieee\n")
    triton = pytest.importorskip("triton")
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
    try:
        assert triton.knobs.language.fp32_default == "ieee"
    finally:
        del os.environ["TRITON_F32_DEFAULT"]


def test_noise_of_gaps_is_the_samplers_on_cpus() -> None:
    """On GPUs: tests/engine/v2/test_gaps.py."""
    seeds = peek_seeds(torch.Generator().manual_seed(5), 3)
    assert torch.equal(gaps.on_cpu(5, 2, 50), gumbel(seeds[2], 50))
