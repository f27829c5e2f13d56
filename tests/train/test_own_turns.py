"""Dialogues that the target writes whole: where a user begins, what is left out, and that a killed run goes on."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from vllm_eagle.cli import main
from vllm_eagle.pair import TARGET
from vllm_eagle.train.data.examples import load_examples
from vllm_eagle.train.data.report import DataReport
from vllm_eagle.train.data.template import ChatTemplate
from vllm_eagle.train.regenerate.command import regenerate
from vllm_eagle.train.regenerate.filters import is_loop
from vllm_eagle.train.regenerate.rewrite import Answer, Generate, Settings
from vllm_eagle.train.regenerate.users import Users

TOKENIZER = AutoTokenizer.from_pretrained(TARGET)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
NAMES = (
    "{{ bos_token }}A chat.{% for m in messages %}{{ '\nUSER: ' if m.role == 'user' else '\nASSISTANT: ' }}{{ m.content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nASSISTANT:' }}{% endif %}"
)
ONE_TURN = "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}U:{{ messages[0].content }}"


def with_template(template: str) -> Any:
    tokenizer = deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    return tokenizer


def users_of(tokenizer: Any, turns: int) -> Users:
    return Users(ChatTemplate(tokenizer, "model"), "model", turns)


class FakeEngine:
    """Says what `user` makes of a number, and answers; dies after a number of calls. Keeps what it was asked."""

    def __init__(
        self,
        user: Callable[[int], str | Answer] = lambda n: f"What comes after {n} sheep?",
        answer: Callable[[str], str | Answer] = lambda question: f"This: {question}",
        first: int = 0,
        dies_at: int | None = None,
    ):
        self.user, self.answer, self.number, self.dies_at = user, answer, first, dies_at
        self.calls: list[tuple[str, list[str], list[float]]] = []
        self.seeds: list[int] = []

    @contextmanager
    def open(self, settings: Settings, seed: int) -> Iterator[Generate]:
        self.seeds.append(seed)
        yield self.generate

    def generate(
        self, prompts: list[list[int]], temperatures: list[float], user_stops: tuple[str, ...] | None = None
    ) -> list[Answer]:
        if len(self.calls) == self.dies_at:
            raise KeyboardInterrupt
        texts = [TOKENIZER.decode(prompt) for prompt in prompts]
        self.calls.append(("answers" if user_stops is None else "users", texts, temperatures))
        said = []
        for text in texts:
            if user_stops is None:
                said.append(self.answer(text.split("<|user|>\n")[-1].split("</s>")[0]))
            else:
                said.append(self.user(self.number))
                self.number += 1
        return [(text, "stop") if isinstance(text, str) else text for text in said]


def settings_for(folder: Path, own: int = 5, **changes: Any) -> Settings:
    settings = Settings(str(TARGET), (), folder / "out.jsonl", temperatures=(0.0, 1.0), own=own, chunk=4)
    return replace(settings, **changes)


def run(settings: Settings, engine: FakeEngine) -> tuple[int, DataReport]:
    report = DataReport()
    return regenerate(settings, report, engine.open, progress=False), report


def written(settings: Settings) -> list[dict[str, Any]]:
    return [json.loads(line) for line in settings.out.read_text().splitlines()] if settings.out.exists() else []


def contents(row: dict[str, Any]) -> list[str]:
    return [message["content"] for message in row["messages"]]


@pytest.mark.parametrize(
    ("template", "before", "between", "stops", "marker"),
    [
        (None, "<s><|user|>\n", "</s><|user|>\n", ("</s>",), "<|assistant|>"),
        (CHATML, "<|im_start|>user\n", "<|im_end|>\n<|im_start|>user\n", ("<|im_end|>",), "<|im_start|>assistant"),
        (INST, "<s>[INST]", "</s>[INST]", ("[/INST]",), "[INST]"),
        (NAMES, "<s>A chat.\nUSER:", "\nUSER:", ("\nASSISTANT:",), "USER:"),
    ],
)
def test_prompts_end_where_a_user_begins(
    template: str | None, before: str, between: str, stops: tuple[str, ...], marker: str
) -> None:
    users = users_of(TOKENIZER if template is None else with_template(template), turns=2)
    assert users.before([]) == before
    dialogue = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    assert users.before(dialogue).endswith("Because." + between)
    assert users.before(dialogue).startswith(before)
    assert users.ends.stops == stops
    assert marker in users.ends.markers
    assert {"<s>", "</s>"} <= set(users.ends.markers)
    assert not {"user", "assistant", "A chat."} & set(users.ends.markers)  # words, and what stands before the first turn only


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        ("", 1, r"model: the tokenizer has no chat template; put"),
        ("{{ bos_token }}{{ messages[0].content }}", 1, "puts nothing before a user's turn, .* give --data"),
        (
            "{{ bos_token }}fixed",
            1,
            r"cannot be cut where a user begins \(it does not show each user's turn once\); .* give --data",
        ),
        ("{% for m in messages %}U:{{ m.content }}{{ m.content }}{% endfor %}", 1, "does not show each user's turn once"),
        (ONE_TURN, 2, r"cannot be cut where a user begins \(one turn\)"),
    ],
)
def test_templates_that_cannot_be_cut_are_refused_in_one_line(template: str, turns: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        users_of(with_template(template), turns)
    assert "\n" not in str(caught.value)


def test_a_template_of_one_turn_is_good_for_one() -> None:
    assert users_of(with_template(ONE_TURN), 1).before([]) == "U:"


def test_users_and_answers_take_turns(tmp_path: Path) -> None:
    settings, engine = settings_for(tmp_path, own=3, turns=3), FakeEngine()
    assert run(settings, engine)[0] == 3
    rows = written(settings)
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * 3
        assert all(answer == f"This: {user}" for user, answer in zip(contents(row)[::2], contents(row)[1::2], strict=True))
    assert [row["source"] for row in rows] == [{"data": 0, "file": "self", "line": i} for i in (1, 2, 3)]
    assert [kind for kind, _, _ in engine.calls] == ["users", "answers"] * 3
    assert set(engine.calls[0][1]) == {"<s><|user|>\n"}
    assert engine.calls[2][1][0] == TOKENIZER.apply_chat_template(rows[0]["messages"][:2], tokenize=False) + "<|user|>\n"
    # User turns are sampled; the temperatures are the answers', the same in all of a dialogue.
    assert {t for kind, _, temperatures in engine.calls for t in temperatures if kind == "users"} == {1.0}
    assert [t for kind, _, t in engine.calls if kind == "answers"] == [[1.0, 0.0, 1.0]] * 3
    examples = load_examples(TOKENIZER, [settings.out], 512, DataReport(), progress=False)
    learnt = [TOKENIZER.decode(example.token_ids[example.loss_mask]) for example in examples]
    assert learnt == ["".join(f"{answer}</s>" for answer in contents(row)[1::2]) for row in rows]


FIRST_TURNS: dict[str, str | Answer] = {
    "user turn empty": " \n",
    "user turn too short": "Hi there!",
    "user turn cut off at max tokens": ("Tell me all about the", "length"),
    "user turn repeats itself": "and then and so " * 8,
    "user turn duplicate of an earlier one": "what comes  after 99 Sheep?",
    "user turn contains template markers": "How are you today?<|assistant|>\nFine.",
}


@pytest.mark.parametrize("reason", FIRST_TURNS)
def test_user_turns_that_teach_nothing_are_counted_and_left_out(tmp_path: Path, reason: str) -> None:
    def user(number: int) -> str | Answer:
        return FIRST_TURNS[reason] if number in (1, 2) else f"What comes after {99 + number} sheep?"

    settings = settings_for(tmp_path, own=6, turns=1)
    num_written, report = run(settings, FakeEngine(user))
    assert num_written == 6
    assert report.counts == {reason: 2}
    assert [finding.line for finding in report.findings] == [2, 3]
    assert [row["source"]["line"] for row in written(settings)] == [1, 4, 5, 6, 7, 8]
    assert f"left out: 2 x {reason}: self:2" in report.summary()


@pytest.mark.parametrize("reason", FIRST_TURNS)
def test_a_later_user_turn_that_teaches_nothing_ends_its_dialogue(tmp_path: Path, reason: str) -> None:
    turns = ["What comes after 99 sheep?", FIRST_TURNS[reason]]
    settings = settings_for(tmp_path, own=1, chunk=1)
    num_written, report = run(settings, FakeEngine(lambda number: turns[number]))
    assert num_written == 1
    assert contents(written(settings)[0]) == [turns[0], f"This: {turns[0]}"]
    assert report.counts == {reason: 1}
    assert "first 2 turns kept" in report.findings[0].detail


@pytest.mark.parametrize(
    ("reason", "answer"),
    [
        ("empty answer", ""),
        ("answer repeats itself", "so and so and " * 8),
        ("answer contains template markers", "Good.\nUSER: And then?"),
    ],
)
def test_answers_that_teach_nothing_are_counted_and_left_out(
    tmp_path: Path, reason: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = with_template(NAMES)
    monkeypatch.setattr("vllm_eagle.train.regenerate.command.load_tokenizer", lambda target: named)
    settings = settings_for(tmp_path, own=4, turns=1)
    engine = FakeEngine(answer=lambda question: answer if "after 1 sheep" in question else "It is the next one.")
    num_written, report = run(settings, engine)
    assert num_written == 4
    assert report.counts == {reason: 1}
    assert [row["source"]["line"] for row in written(settings)] == [1, 3, 4, 5]


def test_a_cut_answer_ends_its_dialogue_and_says_so(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, own=1)
    run(settings, FakeEngine(answer=lambda question: ("It goes on and", "length")))
    assert [message.get("finish_reason") for message in written(settings)[0]["messages"]] == [None, "length"]


def test_arguments_of_the_template_are_in_every_prompt_and_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    styled = with_template("{{ style }}" + str(TOKENIZER.chat_template))
    monkeypatch.setattr("vllm_eagle.train.regenerate.command.load_tokenizer", lambda target: styled)
    settings, engine = settings_for(tmp_path, own=2, chat_template_kwargs={"style": "plain "}), FakeEngine()
    run(settings, engine)
    assert all(text.startswith("plain <s><|user|>") for _, texts, _ in engine.calls for text in texts)
    assert [row["chat_template_kwargs"] for row in written(settings)] == [{"style": "plain "}] * 2


def test_loops_are_told_from_prose_and_code() -> None:
    def loops(text: str) -> bool:
        return is_loop(TOKENIZER(text)["input_ids"])

    assert not loops("Natalia sold 48 clips in April and half as many in May. How many clips did she sell altogether?")
    assert not loops(
        "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\ndef mul(a, b):\n    return a * b\n"
    )
    assert not loops("no no no")
    assert loops("The answer is 5.\n" * 6)
    assert loops("She has some clips. " + "5 + 5 = 10, " * 12)
    assert loops("ha" * 40)


@pytest.mark.parametrize("dies_at", range(9))
def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, dies_at: int) -> None:
    """Chunks of four calls: two user turns and two answers of four dialogues, then of four, then of two."""
    settings, first = settings_for(tmp_path, own=10), FakeEngine(dies_at=dies_at)
    with pytest.raises(KeyboardInterrupt):
        run(settings, first)
    before = written(settings)
    assert len(before) == 4 * (dies_at // 4)
    if before:
        with settings.out.open("a") as out:
            out.write('{"messages": [{"role": "us')  # a line that the killed run did not finish
    # What was said before is said again, and new things.
    second = FakeEngine(first=0)
    assert run(settings, second)[0] == 10 - len(before)
    rows = written(settings)
    assert rows[: len(before)] == before
    assert len(rows) == len({contents(row)[0] for row in rows}) == 10
    lines = [row["source"]["line"] for row in rows]
    assert lines == sorted(set(lines))
    assert second.seeds == [len(before)]  # not the random numbers of the run before
    third = FakeEngine()
    assert run(settings, third)[0] == 0
    assert not third.seeds  # no engine is started for nothing


def test_duplicates_of_earlier_chunks_and_runs_are_found(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, own=6, turns=1)
    num_written, report = run(settings, FakeEngine(lambda number: f"What comes after {number - number // 4} sheep?"))
    assert num_written == 6
    assert report.counts == {"user turn duplicate of an earlier one": 1}  # the fifth is the fourth again
    num_written, report = run(replace(settings, own=8), FakeEngine())
    assert num_written == 2
    assert report.counts == {"user turn duplicate of an earlier one": 6}
    assert len({contents(row)[0] for row in written(settings)}) == 8


def test_a_model_that_says_nothing_useful_is_given_up(tmp_path: Path) -> None:
    engine = FakeEngine(lambda number: "")
    with pytest.raises(ValueError, match=r"of the last 16 user turns that it wrote 0 gave a dialogue.*give --data") as caught:
        run(settings_for(tmp_path), engine)
    assert "16 x user turn empty" in str(caught.value)
    assert Counter(kind for kind, _, _ in engine.calls) == {"users": 4}


def test_what_does_not_fit_is_never_asked(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, own=2, max_model_len=64, max_tokens=30)
    num_written, report = run(settings, FakeEngine(answer=lambda question: "one two three four five six seven eight nine ten"))
    assert num_written == 2
    assert report.counts == {"too long": 2}
    assert all(len(row["messages"]) == 2 for row in written(settings))


def test_options_that_cannot_be_are_refused_before_any_model_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_for(tmp_path)
    for change, message in (
        ({"own": 0}, "--self is 0; it must be at least 1"),
        ({"turns": 0}, "--turns is 0; it must be at least 1"),
        ({"limit": 3}, "--limit is for --data; .* remove it"),
        ({"own": None}, "give either --data FILE, or --self N"),
        ({"data": (tmp_path / "x.jsonl",)}, "give either --data FILE, or --self N"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(settings, **change)
    assert main(["regenerate", "--target", "nowhere", "--out", str(tmp_path / "out.jsonl")]) == 2
    assert (
        capsys.readouterr().err == "vllm-eagle: give either --data FILE, or --self N for dialogues that the target writes itself\n"
    )


def test_an_output_made_with_other_arguments_is_refused(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    run(settings, FakeEngine())
    with pytest.raises(ValueError, match="was made with turns 2, not 1"):
        run(replace(settings, turns=1), FakeEngine())
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Why?"}\n')
    with pytest.raises(ValueError, match="was made with data_sha256 None"):
        run(replace(settings, own=None, data=(data,)), FakeEngine())
