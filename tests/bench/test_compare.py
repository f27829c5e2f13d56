"""Comparisons by kind of prompt: which prompts are counted where, and what comes out of it. Engines are played."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_eagle.bench.engines import offline
from vllm_eagle.bench.passes import compare

# An answer repeats the prompt's one token, as often as the token says; each draft of the trees has as many tokens accepted.
PROMPTS = [[2], [5], [3], [2]]
SETTINGS = compare.Settings(
    model="model",
    head="head",
    prompts=None,
    limit=None,
    temperature=0.0,
    seed=0,
    max_tokens=8,
    dtype="float32",
    only=None,
)


@dataclass
class Played:
    """Ten drafts for each prompt; none without speculation."""

    speculates: bool
    drafts: int = 0
    accepted: int = 0
    calls: list[list[int]] = field(default_factory=list)

    def generate(self, prompts: list[dict[str, list[int]]], params: list[Any], use_tqdm: bool) -> list[Any]:
        asked = [prompt["prompt_token_ids"][0] for prompt in prompts]
        assert [PROMPTS[param.seed] for param in params] == [[token] for token in asked]  # prompt i samples with seed + i
        self.calls.append(asked)
        if self.speculates:
            self.drafts += 10 * len(asked)
            self.accepted += 10 * sum(asked)
        metrics = SimpleNamespace(first_token_latency=0.0, first_token_ts=0.0, last_token_ts=0.0)
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=[token] * token, text=str(token))], metrics=metrics)
            for token in asked
        ]

    def get_metrics(self) -> list[Any]:
        found = {"drafts": self.drafts, "accepted_tokens": self.accepted}
        return [SimpleNamespace(name=f"vllm:spec_decode_num_{name}", value=value) for name, value in found.items()]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Played]:
    """Those that were started."""
    started: list[Played] = []

    @contextlib.contextmanager
    def engine(model: str, **options: Any) -> Iterator[Played]:
        started.append(Played("spec_model" in options))
        yield started[-1]

    monkeypatch.setattr(compare, "engine", engine)
    return started


def test_tau_of_each_kind(engines: list[Played], capsys: pytest.CaptureFixture[str]) -> None:
    result = compare.measure(SETTINGS, PROMPTS, {"tree16": {"spec_model": "head"}}, ["math", "a long name", None, "math"])
    assert [engine.calls for engine in engines] == [[[2, 2], [5], [3]]] * 2
    assert result["tau"] == {"tree16": 4.0}  # the row without a kind is in it
    assert result["by_kind"] == {
        "math": {"prompts": 2, "tokens": 4, "tau": {"tree16": 3.0}},
        "a long name": {"prompts": 1, "tokens": 5, "tau": {"tree16": 6.0}},
    }
    assert (result["prompts"], result["identical"], result["tokens"]) == (4, 4, 12)
    _, titles, plain, tree = capsys.readouterr().out.splitlines()
    assert titles.split() == ["variant", "tau", "identical", "seconds", "math", "a", "long", "name"]
    assert plain.split()[:2] == ["plain", "1.00"]
    assert tree.split()[-2:] == ["3.00", "6.00"]
    assert len(titles) == len(tree)


def test_without_kinds_all_run_at_once(engines: list[Played], capsys: pytest.CaptureFixture[str]) -> None:
    for kinds in (None, [None] * 4):
        result = compare.measure(SETTINGS, PROMPTS, {"tree16": {"spec_model": "head"}}, kinds)
        assert "by_kind" not in result
        assert result["tau"] == {"tree16": 4.0}
    assert [engine.calls for engine in engines] == [[[2, 5, 3, 2]]] * 4
    assert capsys.readouterr().out.splitlines()[1].split() == ["variant", "tau", "identical", "seconds"]


def test_answers_stand_where_their_prompts_do() -> None:
    params = [SimpleNamespace(clone=lambda i=i: SimpleNamespace(seed=i)) for i in range(4)]
    whole, by_kind = offline.generate_by_kind(Played(True), PROMPTS, params, ["b", "a", "a", "b"])  # type: ignore[arg-type]
    assert whole.token_ids == [[2] * 2, [5] * 5, [3] * 3, [2] * 2]
    assert whole.texts == ["2", "5", "3", "2"]
    assert {kind: part.tau for kind, part in by_kind.items()} == {"b": 3.0, "a": 5.0}
