"""The soak test, short; and that each of its checks can fail."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiers import exhaustive
from vllm_eagle.bench.engines.server import Sample, error_lines
from vllm_eagle.bench.soak import run
from vllm_eagle.bench.soak.checks import FEWEST_SAMPLES, MIB, SHORTEST_TREND_S, Seen, checks, failed, memory
from vllm_eagle.bench.soak.clients import BEHAVIOURS, Answer, Choice, Script, Tally, difference, judge, prefix_difference
from vllm_eagle.bench.soak.pool import KINDS, Ask, pool, refused


@exhaustive
def test_a_short_soak_passes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Everything but the trend of memory, for which it is too short."""
    options = ["--minutes", "0.67", "--clients", "24", "--pool", str(4 * len(KINDS)), "--kv-blocks", "40", "--sample-seconds", "2"]
    status = run.main([*options, "--json", str(tmp_path / "soak.json")])
    found = json.loads((tmp_path / "soak.json").read_text())
    assert status == 0, capfd.readouterr().out[-6000:]
    assert [check["name"] for check in found["checks"] if check["passed"] is None] == ["memory is flat"]
    assert found["tau"] > 1.5


# ---- a run in which all is well, and what is done to it


def sample(seconds: float, **metrics: float) -> Sample:
    """A server that has verified two trees a second since it started, with two accepted tokens each."""
    usual = {
        "vllm:num_requests_running": 0.0,
        "vllm:num_requests_waiting": 0.0,
        "vllm:kv_cache_usage_perc": 0.0,
        "vllm:spec_decode_num_drafts_total": 2 * seconds,
        "vllm:spec_decode_num_accepted_tokens_total": 4 * seconds,
        "vllm:num_preemptions_total": 5.0,
        "vllm_eagle_speculation_off": 0.0,
    }
    return Sample(seconds, {"APIServer 1": 600 * MIB, "Worker 2": 900 * MIB}, 100, 50, usual | metrics)


def good_run() -> Seen:
    tally = Tally(requests=Counter(BEHAVIOURS), equal=Counter(dict.fromkeys(KINDS, 3)), equal_beginnings=4, refused=5)
    samples = [sample(10.0 * i) for i in range(1, 91)]
    return Seen(tally, sample(0), samples, sample(910), [], frozenset(KINDS))


def answer(token_ids: list[int], text: str = "one two", **fields: Any) -> Answer:
    return Answer(200, {0: Choice(token_ids, text, finish_reason="length")}, complete=True, **fields)


ASK = Ask(7, "greedy", "/v1/completions", {"temperature": 0, "prompt": [1]})


def different_answer(seen: Seen) -> Seen:
    """One token of one answer tampered with."""
    judge(seen.tally, {7: answer([5, 6, 8])}, "reads", ASK, answer([5, 6, 9]))
    return seen


def failed_answer(seen: Seen) -> Seen:
    judge(seen.tally, {7: answer([5])}, "reads", ASK, Answer(500, error="Internal Server Error"))
    return seen


def at_the_end(**metrics: float) -> Callable[[Seen], Seen]:
    return lambda seen: replace(seen, after=sample(910, **metrics))


def growing(seen: Seen) -> Seen:
    """One MiB more in each sample of the worker."""
    samples = [replace(s, rss_bytes=s.rss_bytes | {"Worker 2": 900 * MIB + i * MIB}) for i, s in enumerate(seen.samples)]
    return replace(seen, samples=samples)


def decaying(seen: Seen) -> Seen:
    accepted = "vllm:spec_decode_num_accepted_tokens_total"
    samples = [sample(s.seconds, **{accepted: min(s.metrics[accepted], 1200.0)}) for s in seen.samples]
    return replace(seen, samples=samples)


def without_a_kind(seen: Seen) -> Seen:
    del seen.tally.equal["json"]
    return seen


BREAKAGES: list[tuple[Callable[[Seen], Seen], str]] = [
    (different_answer, "answers equal the reference"),
    (failed_answer, "no unexpected error or status"),
    (lambda seen: replace(seen, tally=replace(seen.tally, refused=0)), "what must be refused is refused"),
    (at_the_end(**{"vllm:num_requests_running": 1}), "no request left in the engine"),
    (at_the_end(**{"vllm:num_requests_waiting": 2}), "no request left in the engine"),
    (at_the_end(**{"vllm:kv_cache_usage_perc": 0.01}), "no KV cache block in use"),
    (lambda seen: replace(seen, after=replace(seen.after, rss_bytes={"APIServer 1": MIB})), "processes live on"),
    (growing, "memory is flat"),
    (lambda seen: replace(seen, after=replace(seen.after, num_fds=117)), "open files and threads"),
    (lambda seen: replace(seen, after=replace(seen.after, num_threads=67)), "open files and threads"),
    (lambda seen: replace(seen, log_errors=["ERROR: out of luck"]), "no error in the log"),
    (decaying, "tau does not decay"),
    (at_the_end(**{"vllm_eagle_speculation_off": 1}), "speculation is on"),
    (at_the_end(**{"vllm:num_preemptions_total": 0}), "requests were preempted"),
    (without_a_kind, "everything occurred"),
]


def test_a_good_run_passes() -> None:
    found = checks(good_run())
    assert all(check.passed for check in found), found
    assert {check.name for check in found} == {name for _, name in BREAKAGES}


@pytest.mark.parametrize(("breakage", "name"), BREAKAGES, ids=[name for _, name in BREAKAGES])
def test_each_check_can_fail(breakage: Callable[[Seen], Seen], name: str) -> None:
    assert [check.name for check in failed(checks(breakage(good_run())))] == [name]


def test_a_failed_check_is_the_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for breakage, status, verdict in ((lambda seen: seen, 0, "PASS"), (different_answer, 1, "FAIL")):
        seen = breakage(good_run())
        monkeypatch.setattr(run, "_with_own_servers", lambda settings, folder, seen=seen: (seen, {7: None}))
        assert run.main([]) == status
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == verdict
        assert any("token 2: [9] in place of [8]" in line for line in lines) == bool(status)
        assert any("asked again, alone: equal" in line for line in lines) == bool(status)


def test_what_cannot_be_seen_is_not_passed() -> None:
    """Servers of others, without process and log."""
    blind = [replace(s, rss_bytes={}) for s in (sample(0), sample(910))]
    found = checks(replace(good_run(), before=blind[0], after=blind[1], log_errors=None))
    names = {check.name for check in found if check.passed is None}
    assert names == {"processes live on", "memory is flat", "open files and threads", "no error in the log"}
    few = FEWEST_SAMPLES - 1
    assert memory([sample(i * SHORTEST_TREND_S) for i in range(few)]).passed is None
    assert memory([sample(i * SHORTEST_TREND_S / few / 2) for i in range(2 * few)]).passed is None
    assert memory([sample(i * SHORTEST_TREND_S / few) for i in range(few + 1)]).passed
    assert memory([]).passed is None


# ---- answers


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (answer([5, 6, 7]), None),
        (answer([5, 6]), r"token 2: \[\] in place of \[7\]"),
        (answer([5, 6, 7, 8]), r"token 3: \[8\] in place of \[\]"),
        (answer([5, 6, 7], "one  two"), "text"),
        (Answer(200, {0: Choice([5, 6, 7], "one two", finish_reason="stop")}), "finish_reason 'stop'"),
        (Answer(200, {0: Choice([5, 6, 7], "one two", [-0.1], "length")}), "logprobs"),
        (answer([5, 6, 7], prompt_logprobs=[-1.0]), "prompt logprobs"),
        (Answer(200, {}), "choices"),
    ],
)
def test_differences_are_seen(other: Answer, message: str | None) -> None:
    found = difference(answer([5, 6, 7]), other)
    assert found is None if message is None else found is not None and re.search(message, found)


def test_the_beginning_of_an_answer_is_compared() -> None:
    expected = answer([5, 6, 7])
    assert prefix_difference(expected, Answer(200, {0: Choice([5, 6])})) is None
    assert prefix_difference(expected, Answer(200, {})) is None
    assert prefix_difference(expected, Answer(200, {0: Choice([5, 7])})) is not None


def test_answers_are_put_together_from_pieces() -> None:
    found = Answer(200)
    for ids, text, finish in (([5], "a", None), ([6, 7], "b", None), ([], "", "stop")):
        piece = {"index": 0, "text": text, "token_ids": ids, "finish_reason": finish, "stop_reason": 7 if finish else None}
        piece["logprobs"] = {"token_logprobs": [-float(i) for i in ids]}
        found.add({"choices": [piece]})
    found.add({"choices": [{"index": 1, "delta": {"content": "c"}, "token_ids": [8]}]})
    found.add({"choices": [], "usage": {"completion_tokens": 4}})
    assert found.choices == {0: Choice([5, 6, 7], "ab", [-5.0, -6.0, -7.0], "stop", 7), 1: Choice([8], "c")}
    assert found.usage == found.num_tokens == 4
    found.add({"error": {"message": "EngineCore died"}})
    assert found.error is not None


# ---- requests


def test_the_pool_has_every_kind_and_length() -> None:
    questions = [list(range(i, i + 60)) for i in range(20)]
    asks = pool("m", questions, [[{"role": "user", "content": "?"}]], 512, 4 * len(KINDS), 0)
    assert asks == pool("m", questions, [[{"role": "user", "content": "?"}]], 512, 4 * len(KINDS), 0)
    assert {ask.kind for ask in asks} == set(KINDS)
    assert {ask.kind for ask in asks if not ask.comparable} == {"unseeded"}
    lengths = {len(ask.body["prompt"]) for ask in asks if "prompt" in ask.body}
    assert min(lengths) < 5
    assert 500 < max(lengths) < 512
    assert any("messages" in ask.body for ask in asks)


def test_even_a_short_run_has_everything() -> None:
    asks = pool("m", [[5] * 60], [[]], 512, 92, 0)
    script = Script(asks, {}, refused("m", 512, 16), 0)
    assert {next(script.behaviours) for _ in range(sum(BEHAVIOURS.values()))} == set(BEHAVIOURS)
    assert {next(script.asks).kind for _ in KINDS} == set(KINDS)


def test_error_lines_of_a_log(tmp_path: Path) -> None:
    lines = [
        "INFO all is well",
        "(Worker pid=3) ERROR 11-23 [x.py:1] no",
        "WARNING ERRORS are rare",
        "Traceback (most recent call last):",
    ]
    (tmp_path / "log").write_text("\n".join(lines))
    assert error_lines(tmp_path / "log") == [lines[1], lines[3]]


def test_options_that_belong_together(capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--base-url", "http://x"], "--reference-url"),
        (["--pid", "1"], "--base-url"),
        (["--json", "/no/x"], "create it"),
    ):
        with pytest.raises(SystemExit):
            run.main(options)
        assert message in capsys.readouterr().err
