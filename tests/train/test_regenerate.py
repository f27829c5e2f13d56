"""Regeneration: the target's answers take the place of the old ones, and a killed run goes on where it stopped."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_eagle.cli import main
from vllm_eagle.pair import TARGET
from vllm_eagle.train.data.examples import load_examples
from vllm_eagle.train.data.report import CUT_ANSWER, OUTSIDE, DataReport
from vllm_eagle.train.regenerate.command import regenerate
from vllm_eagle.train.regenerate.rewrite import Answer, Generate, Settings

TOKENIZER = AutoTokenizer.from_pretrained(TARGET)


class FakeEngine:
    """Answers with its prompt's last question; dies after a number of calls. Keeps what it was asked."""

    def __init__(self, dies_at: int | None = None, reasons: dict[str, str] | None = None, says: str = "new "):
        self.dies_at, self.reasons, self.says = dies_at, reasons or {}, says
        self.seeds: list[int] = []
        self.calls: list[list[tuple[str, float]]] = []

    @contextmanager
    def open(self, settings: Settings, seed: int) -> Iterator[Generate]:
        self.seeds.append(seed)
        yield self.generate

    def generate(self, prompts: list[list[int]], temperatures: list[float]) -> list[Answer]:
        if len(self.calls) == self.dies_at:
            raise KeyboardInterrupt
        texts = [TOKENIZER.decode(prompt) for prompt in prompts]
        self.calls.append(list(zip(texts, temperatures, strict=True)))
        answers = []
        for text, temperature in self.calls[-1]:
            question = text.split("<|user|>\n")[-1].split("</s>")[0]
            answer = "" if question == "silence" else f"{self.says}{question} at {temperature}"
            answers.append((answer, self.reasons.get(question, "stop")))
        return answers


def dialogue(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def settings_for(folder: Path, *rows: Any, **changes: Any) -> Settings:
    data = folder / "data.jsonl"
    data.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    settings = Settings(target=str(TARGET), data=(data,), out=folder / "out.jsonl", temperatures=(0.0, 1.0), chunk=2)
    return replace(settings, **changes)


def run(settings: Settings, engine: FakeEngine) -> tuple[int, DataReport]:
    report = DataReport()
    return regenerate(settings, report, engine.open, progress=False), report


def written(settings: Settings) -> list[dict[str, Any]]:
    return [json.loads(line) for line in settings.out.read_text().splitlines()]


def contents(row: dict[str, Any]) -> list[str]:
    return [message["content"] for message in row["messages"]]


def test_every_answer_is_replaced_with_the_new_ones_as_context(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {"messages": [system, *dialogue("a?", "old", "b?", "old", "c?", "old")["messages"]]},
        {"conversations": [{"from": "human", "value": "d?"}, {"from": "gpt", "value": "old"}, {"from": "human", "value": "e?"}]},
        {"prompt": "f?"},
    ]
    settings, engine = settings_for(tmp_path, *rows), FakeEngine()
    assert run(settings, engine)[0] == 3
    first, second, third = written(settings)
    assert contents(first) == ["Be brief.", "a?", "new a? at 0.0", "b?", "new b? at 0.0", "c?", "new c? at 0.0"]
    assert [message["role"] for message in first["messages"]] == ["system", *["user", "assistant"] * 3]
    assert contents(second) == ["d?", "new d? at 1.0", "e?", "new e? at 1.0"]
    assert contents(third) == ["f?", "new f? at 0.0"]
    assert first["source"] == {"data": 0, "file": "data.jsonl", "line": 1}
    # Chunks of two rows: all first answers together, then all second ones, then the third.
    assert [len(call) for call in engine.calls] == [2, 2, 1, 1]
    assert engine.calls[2][0][0] == TOKENIZER.apply_chat_template(
        first["messages"][:-1], tokenize=False, add_generation_prompt=True
    )
    assert not any("old" in text for call in engine.calls for text, _ in call)


@pytest.mark.parametrize("dies_at", range(5))
def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, dies_at: int) -> None:
    rows = [dialogue(f"{i}?", "old", *(["more?", "old"] if i == 3 else [])) for i in range(7)]
    (tmp_path / "whole").mkdir()
    whole = settings_for(tmp_path / "whole", *rows)
    run(whole, FakeEngine())
    settings, second = settings_for(tmp_path, *rows), FakeEngine()
    with pytest.raises(KeyboardInterrupt):
        run(settings, FakeEngine(dies_at))
    num_done = len(written(settings)) if settings.out.exists() else 0
    assert num_done == 2 * (dies_at if dies_at < 2 else max(1, dies_at - 1))  # the second chunk takes two calls
    if num_done:
        with settings.out.open("a") as out:
            out.write('{"messages": [{"role": "us')  # a line that the killed run did not finish
    assert run(settings, second)[0] == len(rows) - num_done
    assert written(settings) == written(whole)
    assert second.seeds == [num_done]  # not the random numbers of the run before
    third = FakeEngine()
    assert run(settings, third)[0] == 0
    assert not third.seeds  # no engine is started for nothing
    assert written(settings) == written(whole)


def test_more_rows_can_be_asked_for_later(tmp_path: Path) -> None:
    rows = [dialogue(f"{i}?", "old") for i in range(5)]
    settings = settings_for(tmp_path, *rows, temperatures=(0.0, 0.5, 1.0), limit=2)
    assert run(settings, FakeEngine())[0] == 2
    assert run(replace(settings, limit=None), FakeEngine())[0] == 3
    answers = [contents(row)[1] for row in written(settings)]
    assert answers == ["new 0? at 0.0", "new 1? at 0.5", "new 2? at 1.0", "new 3? at 0.0", "new 4? at 0.5"]


def test_rows_of_several_files_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = settings_for(tmp_path / "other", dialogue("b?", "old"))
    settings = settings_for(tmp_path, dialogue("a?", "old"))
    settings = replace(settings, data=settings.data + other.data)
    assert run(settings, FakeEngine())[0] == 2
    assert [row["source"] for row in written(settings)] == [{"data": i, "file": "data.jsonl", "line": 1} for i in range(2)]
    assert run(settings, FakeEngine())[0] == 0


def test_an_output_made_with_other_arguments_is_refused(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, dialogue("a?", "old"))
    run(settings, FakeEngine())
    for change, message in (
        ({"temperatures": (0.5,)}, r"temperatures \[0.0, 1.0\], not \[0.5\]"),
        ({"max_tokens": 7}, "max_tokens 256, not 7"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"chat_template_kwargs": {"bos_token": ""}}, "chat_template_kwargs None, not {'bos_token': ''}"),
    ):
        with pytest.raises(ValueError, match=message):
            run(replace(settings, **change), FakeEngine())
    before = settings.out.read_bytes()
    with pytest.raises(ValueError, match=r"out\.jsonl: was made with data_sha256"):
        run(settings_for(tmp_path, dialogue("b?", "old")), FakeEngine())
    assert settings.out.read_bytes() == before
    (tmp_path / "out.jsonl.meta.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"out\.jsonl\.meta\.json: cannot be read \(.*\); choose another --out, or delete it and out"
    ):
        run(settings, FakeEngine())
    (tmp_path / "out.jsonl.meta.json").unlink()
    with pytest.raises(ValueError, match=r"out\.jsonl: exists, but out\.jsonl\.meta\.json does not say"):
        run(settings, FakeEngine())


def test_a_line_broken_in_the_middle_of_the_output_is_no_torn_end(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, dialogue("a?", "old"))
    run(settings, FakeEngine())
    settings.out.write_text('{"mess\n' + settings.out.read_text())
    with pytest.raises(ValueError, match=r"out\.jsonl, line 1: no JSON"):
        run(settings, FakeEngine())


def test_what_does_not_fit_is_reported_and_never_asked(tmp_path: Path) -> None:
    long = "word " * 100
    rows = [dialogue(long, "old"), dialogue("a?", "old", long, "old"), dialogue("b?", "old")]
    settings, engine = settings_for(tmp_path, *rows, max_model_len=80, max_tokens=30), FakeEngine()
    num_written, report = run(settings, engine)
    assert num_written == 2
    # The second keeps the answer that fitted.
    assert [contents(row) for row in written(settings)] == [["a?", "new a? at 1.0"], ["b?", "new b? at 0.0"]]
    assert [(f.line, f.reason) for f in report.findings] == [(1, "too long"), (2, "too long")]
    assert "room for 50" in report.findings[0].detail
    assert "first 2 turns kept" in report.findings[1].detail
    assert len(engine.calls) == 2
    # With more room the first row comes, too; the others stay.
    assert run(replace(settings, max_model_len=500), FakeEngine())[0] == 1


def test_an_answer_that_reaches_max_tokens_ends_its_dialogue_without_an_end_of_turn(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, dialogue("a?", "old", "b?", "old"), dialogue("c?", "old", "d?", "old"))
    run(settings, FakeEngine(reasons={"a?": "length"}))
    cut, whole = written(settings)
    assert contents(cut) == ["a?", "new a? at 0.0"]
    assert cut["messages"][-1]["finish_reason"] == "length"
    assert contents(whole) == ["c?", "new c? at 1.0", "d?", "new d? at 1.0"]
    examples = load_examples(TOKENIZER, [settings.out], 512, DataReport(), progress=False)
    learnt = [TOKENIZER.decode(example.token_ids[example.loss_mask]) for example in examples]
    assert learnt == ["new a? at 0.0", "new c? at 1.0</s>new d? at 1.0</s>"]


def test_cut_answers_and_dropped_turns_are_counted(tmp_path: Path) -> None:
    """Two turns behind a cut answer, one behind an empty one; of the last row the question that found no room, and one more."""
    rows = [
        dialogue("a?", "old", "b?", "old", "c?", "old"),
        dialogue("d?", "old"),
        dialogue("silence", "old", "e?", "old"),
        dialogue("f?", "old", "word " * 100, "old", "g?", "old"),
    ]
    settings = settings_for(tmp_path, *rows, max_model_len=80, max_tokens=30)
    _, report = run(settings, FakeEngine(reasons={"a?": "length", "d?": "length"}))
    data = settings.data[0]
    assert report.counts == {CUT_ANSWER: 2, "empty answer": 1, "too long": 1}
    assert f"  kept: 2 x {CUT_ANSWER}: {data}:1 (first 2 turns kept), {data}:2 (first 2 turns kept)" in report.complaints()
    assert report.complaints()[-1] == f"  turns dropped: 6 (2 x {CUT_ANSWER}, 2 x empty answer, 2 x too long)"


# Opens the reasoning unless told not to, drops that of earlier answers, shows tools.
TEMPLATE = (
    "{% if tools %}{{ tools[0].name + ' ' }}{% endif %}{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
    "{{ m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'] }}{{ eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n<think>\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
)


@pytest.mark.parametrize("arguments", [None, {"enable_thinking": False}])
def test_what_was_written_is_learnt_behind_the_prompt_that_it_was_written_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any] | None
) -> None:
    """With nothing but the file: tools, system prompt and arguments are in it."""
    tokenizer = deepcopy(TOKENIZER)
    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr("vllm_eagle.train.regenerate.command.load_tokenizer", lambda target: tokenizer)
    rows = [
        dialogue("a?", "old", "b?", "old") | {"system": "Be brief.", "tools": [{"name": "add"}]},
        dialogue("c?", "old", "cut", "old"),
        dialogue("d?", "old") | {"chat_template_kwargs": {"enable_thinking": False}},
    ]
    settings = settings_for(tmp_path, *rows, chat_template_kwargs=arguments)
    engine = FakeEngine(reasons={"cut": "length"}, says="hm</think>new ")
    run(settings, engine)
    asked = [text for call in engine.calls for text, _ in call]
    assert asked[0].startswith("add <s><|system|>\nBe brief.</s>\n<|user|>\na?</s>\n<|assistant|>\n<think>\n")
    opened = "<think>\n" if arguments is None else "<think>\n\n</think>\n\n"
    assert [text.endswith(f"<|assistant|>\n{opened}") for text in asked[:4]] == [True] * 4
    assert asked[4].endswith("<|assistant|>\n<think>\n\n</think>\n\n")
    report = DataReport()
    examples = load_examples(tokenizer, [settings.out], 512, report, progress=False)
    found = {tokenizer.decode(e.token_ids): tokenizer.decode(e.token_ids[e.loss_mask]) for e in examples}
    expected = {}
    for prompt in asked:
        question = prompt.split("<|user|>\n")[-1].split("</s>")[0]
        temperature = 1.0 if question in ("c?", "cut") else 0.0
        answer = f"hm</think>new {question} at {temperature}" + ("" if question == "cut" else "</s>")
        expected[prompt + answer] = answer
    assert found == expected
    assert not report.counts


def test_tokens_that_the_target_lacks_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    monkeypatch.setattr("vllm_eagle.train.regenerate.command.load_tokenizer", lambda target: tokenizer)
    settings = settings_for(tmp_path, dialogue("a?", "old", "[PAD]?", "old"), dialogue("b?", "old"))
    num_written, report = run(settings, FakeEngine())
    assert num_written == 2
    size = len(TOKENIZER)
    assert [(f.line, f.reason) for f in report.findings] == [(1, OUTSIDE)]
    assert report.findings[0].detail == f"[PAD] is number {size} of {size}; first 2 turns kept"


def test_rows_without_a_question_are_reported(tmp_path: Path) -> None:
    tool = [*dialogue("a?", "old")["messages"], {"role": "tool", "content": "42"}, {"role": "assistant", "content": "old"}]
    rows = [{"text": "a"}, {"messages": tool}, {"messages": [{"role": "system", "content": "s"}]}, "{", dialogue("silence", "old")]
    num_written, report = run(settings_for(tmp_path, *rows), FakeEngine())
    assert num_written == 0
    reasons = ["plain text", "tool turn", "no user turn", "broken JSON", "empty answer"]
    assert [(f.line, f.reason) for f in report.findings] == list(enumerate(reasons, start=1))


def test_options_that_cannot_be_are_refused_before_any_model_is_read(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, dialogue("a?", "old"))
    for change, message in (
        ({"max_tokens": 0}, "--max-tokens is 0"),
        ({"max_tokens": 1024}, "leave room for a question within --max-model-len"),
        ({"temperatures": (0.0, -1.0)}, "--temperature is -1.0"),
        ({"limit": 0}, "--limit is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(settings, **change)
    for change, message in (
        ({"data": (tmp_path / "nowhere.jsonl",)}, "nowhere.jsonl: no such file"),
        ({"max_model_len": 100_000}, "has only 2048 positions"),
        ({"out": tmp_path / "nowhere" / "out.jsonl"}, "its folder does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            run(replace(settings, **change), FakeEngine())


def test_vllm_writes_the_targets_own_greedy_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real thing, as a user types it, against transformers; a second run finds nothing to do."""
    rows = [dialogue("What is 3 + 4?", "old", "And 5 + 6?", "old"), dialogue("Tom has 3 apples and buys 4. How many?", "old")]
    rows += [{"prompt": "A train goes 60 miles in 2 hours. How fast is it?"}, {"text": "left out"}]
    settings = settings_for(tmp_path, *rows)
    arguments = ["regenerate", "--target", str(TARGET), "--data", str(settings.data[0])]
    arguments += ["--out", str(settings.out), "--temperature", "0", "--max-tokens", "24", "--dtype", "float32"]
    command = [sys.executable, "-m", "vllm_eagle.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1 x plain text" in done.stdout
    assert done.stdout.splitlines()[-1] == f"3 dialogues added to {settings.out}"
    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    for row in written(settings):
        for k, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                ids = TOKENIZER.apply_chat_template(row["messages"][:k], add_generation_prompt=True, return_tensors="pt")[
                    "input_ids"
                ]
                answer = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
                assert message["content"] == TOKENIZER.decode(answer, skip_special_tokens=True)
                assert (message.get("finish_reason") == "length") == (TOKENIZER.eos_token_id not in answer)
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"0 dialogues added to {settings.out}"
