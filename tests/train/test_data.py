"""Training data: what a row may look like, which tokens of it count for the loss, and what is said about bad rows."""

import gzip
import hashlib
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vllm_eagle.cli import main
from vllm_eagle.pair import TARGET
from vllm_eagle.train.data.answers import token_mask
from vllm_eagle.train.data.examples import CHUNK, DataReport, Example, file_hash, load_examples
from vllm_eagle.train.data.report import OUTSIDE, OVER_LONG, PARTLY, REWRITTEN, UNSHOWN
from vllm_eagle.train.data.rows import RESERVED

PROMPT = "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
HEADER = "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
MARKED = (
    HEADER + "{%- if m['role'] == 'assistant' %}{%- generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}" + PROMPT
)
# Line break after the end of turn; earlier answers lose their reasoning.
FORGETFUL = (
    HEADER + "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ eos_token + '\n' }}{% endfor %}" + PROMPT
)
# The last answer gets an empty reasoning part, so a shorter rendering is no beginning of a longer one.
THINKS_LAST = (
    HEADER + "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + eos_token + '\n' }}{% endfor %}" + PROMPT
)
# The prompt opens the reasoning, unless it is told not to; what answers say stays as it is.
THINKS = HEADER + (
    "{{ m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n<think>\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
)
# The prompt opens the reasoning, a finished dialogue never shows it.
PROMPT_THINKS = (
    HEADER + "{{ m['content'].split('</think>')[-1] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n<think>' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"

DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 3 + 4?"},
    {"role": "assistant", "content": "3 + 4 = 7."},
    {"role": "user", "content": "Is 3 + 4 = 7. right?"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TARGET)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: Any, name: str = "data.jsonl") -> Path:
        lines = [row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


def load(tokenizer: Any, *paths: Path, max_length: int = 512, **options: Any) -> tuple[list[Example], DataReport]:
    report = DataReport()
    return load_examples(tokenizer, paths, max_length, report, progress=False, **options), report


def learnt(tokenizer: Any, example: Example) -> str:
    return tokenizer.decode(example.token_ids[example.loss_mask])


def turns(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def sharegpt(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": name, "value": value} for name, value in pairs]}


# Which tokens count


@pytest.mark.parametrize("template", [None, MARKED])
def test_answers_with_their_end_of_turn_count_and_nothing_else(tokenizer: Any, write: Any, template: str | None) -> None:
    expected = tokenizer.apply_chat_template(DIALOGUE, return_dict=False)
    tokenizer.chat_template = template or tokenizer.chat_template
    [example], report = load(tokenizer, write({"messages": DIALOGUE}))
    assert example.token_ids.tolist() == expected
    assert (example.token_ids.dtype, example.loss_mask.dtype) == (torch.int32, torch.bool)
    # "3 + 4 = 7." stands in the question, too.
    assert learnt(tokenizer, example) == "3 + 4 = 7.</s>Yes.</s>"
    assert (report.num_rows, report.num_examples, report.counts) == (1, 1, {})
    assert (report.num_tokens, report.num_loss_tokens) == (len(expected), int(example.loss_mask.sum()))


def test_answers_are_found_behind_a_template_that_changes_the_last_one(tokenizer: Any, write: Any) -> None:
    tokenizer.chat_template = THINKS_LAST
    [example], report = load(tokenizer, write({"messages": DIALOGUE}))
    # The line break after </s> is the template's, no model emits it.
    assert learnt(tokenizer, example) == "3 + 4 = 7.</s><think></think>Yes.</s>"
    assert not report.counts


def test_an_answer_is_not_mistaken_for_a_question_that_quotes_it(tokenizer: Any, write: Any) -> None:
    """No rendering of a part is a beginning of the whole, so only the text can be searched for."""
    tokenizer.chat_template = "{{ messages | length }}" + HEADER + "{{ m['content'] + eos_token + '\n' }}{% endfor %}" + PROMPT
    [example], report = load(tokenizer, write(turns("Say yes or no: yes?", "yes", "Now no: no no", "no")))
    assert learnt(tokenizer, example) == "yes</s>no</s>"
    marked = example.loss_mask.nonzero().flatten().tolist()
    headers = (example.token_ids == tokenizer.convert_tokens_to_ids("<|assistant|>")).nonzero().flatten().tolist()
    assert marked[0] == headers[0] + 2  # header, line break, answer
    assert not report.counts


def test_an_earlier_answer_that_loses_its_reasoning_is_learnt_as_it_was_written(tokenizer: Any, write: Any) -> None:
    tokenizer.chat_template = FORGETFUL
    path = write(turns("a?", "<think>hm</think>A.", "b?", "<think>so</think>B."), turns("a?", "A.", "b?", "B."))
    examples, report = load(tokenizer, path)
    assert [learnt(tokenizer, example) for example in examples] == [
        "<think>so</think>B.</s>",
        "<think>hm</think>A.</s>",
        "A.</s>B.</s>",
    ]
    assert not report.counts
    assert "hm" not in tokenizer.decode(examples[0].token_ids)
    assert "so" not in tokenizer.decode(examples[1].token_ids)


def test_a_last_answer_that_the_template_hides_is_learnt_as_it_was_written(tokenizer: Any, write: Any) -> None:
    tokenizer.chat_template = PROMPT_THINKS
    [example], _ = load(tokenizer, write(turns("a?", "well</think>A.")))
    assert tokenizer.decode(example.token_ids) == "<s><|user|>\na?</s><|assistant|>\n<think>well</think>A.</s>"
    assert learnt(tokenizer, example) == "well</think>A.</s>"


@pytest.mark.parametrize(
    ("answer", "finish_reason", "arguments", "text", "loss"),
    [
        ("hm</think>A.", None, None, "<think>\nhm</think>A.</s>", "hm</think>A.</s>"),
        ("<think>\nhm</think>A.", None, None, "<think>\nhm</think>A.</s>", "hm</think>A.</s>"),  # not opened twice
        ("A.", None, None, "A.</s>", "A.</s>"),
        ("A.", "stop", None, "<think>\nA.</s>", "A.</s>"),
        ("hm, let", "length", None, "<think>\nhm, let", "hm, let"),
        ("A.", "stop", {"enable_thinking": False}, "<think>\n\n</think>\n\nA.</s>", "A.</s>"),
        ("A is", "length", {"enable_thinking": False}, "<think>\n\n</think>\n\nA is", "A is"),
    ],
)
def test_an_answer_stands_behind_the_prompt_that_the_target_sees(
    tokenizer: Any, write: Any, answer: str, finish_reason: str | None, arguments: Any, text: str, loss: str
) -> None:
    """For a template that opens the reasoning in the prompt and shows answers as they are."""
    tokenizer.chat_template = THINKS
    row = turns("a?", answer)
    row["messages"][-1]["finish_reason"] = finish_reason
    [example], report = load(tokenizer, write(row), arguments=arguments)
    assert tokenizer.decode(example.token_ids) == f"<s><|user|>\na?</s><|assistant|>\n{text}"
    assert learnt(tokenizer, example) == loss
    assert not report.counts


def test_answers_of_the_target_are_learnt_word_for_word_or_apart(tokenizer: Any, write: Any) -> None:
    """The template trims answers, and shows the last one with an empty reasoning."""
    tokenizer.chat_template = THINKS_LAST.replace("m['content'] + eos", "m['content'] | trim + eos")
    row = turns("a?", "A.", "b?", " B. ", "c?", "C.")
    for message in row["messages"][1::2]:
        message["finish_reason"] = "stop"
    examples, report = load(tokenizer, write(row))
    assert [learnt(tokenizer, example) for example in examples] == ["A.</s>", " B. </s>", "C.</s>"]
    second = "<s><|user|>\na?</s>\n<|assistant|>\nA.</s>\n<|user|>\nb?</s>\n<|assistant|>\n B. </s>"
    assert tokenizer.decode(examples[1].token_ids) == second
    assert not report.counts


def test_an_answer_behind_a_prompt_that_the_template_does_not_render_is_reported(tokenizer: Any, write: Any) -> None:
    """Its text is not in the whole rendering either."""
    tokenizer.chat_template = "{% if messages[-1]['role'] == 'user' %}{{ raise_exception('no answer') }}{% endif %}" + FORGETFUL
    [example], report = load(tokenizer, write(turns("a?", "<think>hm</think>A.", "b?", "B.")))
    assert learnt(tokenizer, example) == "B.</s>"
    assert [(f.line, f.reason, f.detail) for f in report.findings] == [(1, REWRITTEN, "1 turns")]


@pytest.mark.parametrize("marked", [False, True])
def test_an_answer_ends_as_the_target_ends_it_if_the_template_does_not_say(tokenizer: Any, write: Any, marked: bool) -> None:
    marks = (
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}"
    )
    body = marks if marked else "{{ m['content'] }}"
    tokenizer.chat_template = "{% for m in messages %}{{ '\n' + m['role'] + ':\n' }}" + body + "{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '\nassistant:\n' }}{% endif %}"
    [example], _ = load(tokenizer, write(turns("a?", "A.", "b?", "B.")))
    assert tokenizer.decode(example.token_ids) == "\nuser:\na?\nassistant:\nA.\nuser:\nb?\nassistant:\nB.</s>"
    assert learnt(tokenizer, example) == "A.B.</s>"


# Marks that leave out what ends an answer; marks that are counted from the wrong place, as inside of a macro.
MARKS_TEXT = HEADER + (
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{{ eos_token }}{% endfor %}"
)
MARKS_MACRO = (
    "{% macro turn(m) %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% endmacro %}{{ bos_token }}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' + turn(m) }}"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [MARKS_TEXT, MARKS_MACRO])
def test_marks_are_checked_against_the_text(tokenizer: Any, write: Any, template: str) -> None:
    tokenizer.chat_template = template + PROMPT
    [example], report = load(tokenizer, write({"messages": DIALOGUE}))
    assert learnt(tokenizer, example) == "3 + 4 = 7.</s>Yes.</s>"
    assert not report.counts


@pytest.mark.parametrize("template", [None, MARKED])
def test_trimmed_offsets_lose_no_answer(tokenizer: Any, write: Any, template: str | None) -> None:
    """Their tokens begin behind a space, or are nothing where they are one."""
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    cut = turns("a?", " A b ", "b?", "  B is  ")
    cut["messages"][-1]["finish_reason"] = "length"
    examples, report = load(tokenizer, write(turns("a?", " A b", "b?", "   B."), cut))
    assert [learnt(tokenizer, example) for example in examples] == [" A b</s>   B.</s>", " A b </s>  B is  "]
    assert not report.counts


def test_a_loss_that_misses_a_part_of_an_answer_is_reported(tokenizer: Any, write: Any) -> None:
    tokenizer.add_tokens(["nA"])  # reaches from the prompt into the answer
    tokenizer.chat_template = (
        HEADER.replace("|>\n", "|>n") + "{{ m['content'] + eos_token }}{% endfor %}" + PROMPT.replace("\n", "n")
    )
    [example], report = load(tokenizer, write(turns("a?", "Ab.")))
    assert learnt(tokenizer, example) == "b.</s>"
    assert [(f.line, f.reason, f.detail[:2]) for f in report.findings] == [(1, PARTLY, "1 ")]


def test_long_dialogues_are_rendered_as_far_as_they_are_trained_on(tokenizer: Any, write: Any, monkeypatch: Any) -> None:
    contents = [f"{i}?" if i % 2 == 0 else f"{i}." for i in range(3000)]
    rendered: list[int] = []
    render = type(tokenizer).apply_chat_template

    def counted(self: Any, messages: Any, **options: Any) -> Any:
        rendered.append(len(messages))
        return render(self, messages, **options)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counted)
    [example], report = load(tokenizer, write(turns(*contents)))
    assert len(rendered) < 150
    monkeypatch.undo()
    [shorter], _ = load(tokenizer, write(turns(*contents[:64])), max_length=300)
    assert len(example.token_ids) == 512
    assert example.token_ids[:300].tolist() == shorter.token_ids.tolist()
    assert example.loss_mask[:300].tolist() == shorter.loss_mask.tolist()
    answers = learnt(tokenizer, example).split("</s>")
    assert answers[:-1] == contents[1 : 2 * len(answers) - 1 : 2]
    assert report.counts == {OVER_LONG: 1}


def test_tokens_that_the_target_lacks_are_reported(tokenizer: Any, write: Any) -> None:
    """As of a pad token that was added to a tokenizer and not to its model."""
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    path = write(turns("a?", "A."), turns("[PAD] b?", "B."), {"text": "c [PAD]"}, {"text": "some text"})
    examples, report = load(tokenizer, path, vocab_size=size)
    assert sorted(learnt(tokenizer, example) for example in examples) == ["<s>some text</s>", "A.</s>"]
    assert [(f.line, f.reason, f.detail) for f in sorted(report.findings, key=lambda f: f.line)] == [
        (line, OUTSIDE, f"[PAD] is number {size} of {size}") for line in (2, 3)
    ]
    assert max(int(example.token_ids.max()) for example in examples) < size


# What reaches the template

SHOWS_ALL = (
    "{% if tools %}{{ 'TOOLS ' + tools | map(attribute='name') | join(' ') + ' ' }}{% endif %}{{ style or '' }}"
    + HEADER
    + ("{{ m['content'] + eos_token }}{% endfor %}" + PROMPT)
)
TOOLS = [{"name": "add"}, {"name": "mul"}]


@pytest.mark.parametrize(
    ("beside", "start"),
    [
        ({"system": "Be brief."}, "<s><|system|>\nBe brief.</s><|user|>"),
        ({"system_prompt": "Be brief."}, "<s><|system|>\nBe brief.</s><|user|>"),
        ({"system": "", "tools": [], "images": [], "chat_template_kwargs": {}}, "<s><|user|>"),
        ({"system": None, "tools": None, "images": None, "chat_template_kwargs": None}, "<s><|user|>"),
        ({"tools": TOOLS}, "TOOLS add mul <s><|user|>"),
        ({"tools": json.dumps(TOOLS)}, "TOOLS add mul <s><|user|>"),
        ({"chat_template_kwargs": {"style": "plain "}}, "plain <s><|user|>"),
        ({"tools": TOOLS, "system": "Be brief.", "chat_template_kwargs": {"style": "s "}}, "TOOLS add mul s <s><|system|>\nBe"),
    ],
)
def test_all_of_a_row_reaches_the_template(tokenizer: Any, write: Any, beside: dict[str, Any], start: str) -> None:
    tokenizer.chat_template = SHOWS_ALL
    shapes = (turns("a?", "A."), sharegpt(("human", "a?"), ("gpt", "A.")))
    examples, report = load(tokenizer, write(*(row | beside for row in shapes)))
    assert len(examples) == 2
    for example in examples:
        assert tokenizer.decode(example.token_ids).startswith(start)
        assert learnt(tokenizer, example) == "A.</s>"
    assert not report.counts


def test_a_rows_arguments_come_before_the_runs(tokenizer: Any, write: Any) -> None:
    tokenizer.chat_template = SHOWS_ALL
    path = write(turns("a?", "A."), turns("a?", "A.") | {"chat_template_kwargs": {"style": "row "}})
    examples, _ = load(tokenizer, path, arguments={"style": "run "})
    assert [tokenizer.decode(example.token_ids)[:4] for example in examples] == ["run ", "row "]


def test_a_system_prompt_that_stands_there_already_is_not_doubled(tokenizer: Any, write: Any) -> None:
    [example], _ = load(tokenizer, write({"messages": DIALOGUE, "system": "Be brief."}))
    assert tokenizer.decode(example.token_ids).count("Be brief.") == 1


def test_tools_that_a_template_does_not_show_are_reported(tokenizer: Any, write: Any) -> None:
    [example], report = load(tokenizer, write(turns("a?", "A.") | {"tools": TOOLS}))
    assert learnt(tokenizer, example) == "A.</s>"
    assert report.counts == {UNSHOWN: 1}
    assert f"kept: 1 x {UNSHOWN}" in report.summary()


def test_arguments_that_the_template_does_not_use_are_refused(tokenizer: Any, write: Any) -> None:
    tokenizer.chat_template = SHOWS_ALL
    message = "--chat-template-kwargs: the chat template of .* does not use enable_thinking; remove it"
    with pytest.raises(ValueError, match=message):
        load(tokenizer, write(turns("a?", "A.")), arguments={"style": "s", "enable_thinking": False})


@pytest.mark.parametrize("command", ["train", "train --self 20", "regenerate", "eval", "compare"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{enable_thinking: false}", "no JSON (Expecting property name enclosed in double quotes"),
        ("[1]", "template arguments are no object (list)"),
        ('{"tokenize": true, "style": 1}', "template arguments that are none (tokenize)"),
    ],
)
def test_arguments_that_cannot_be_are_one_line_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, value: str, message: str
) -> None:
    words = {
        "train": "--target nowhere --data nowhere.jsonl --out out",
        "train --self 20": "--target nowhere --out out",
        "regenerate": "--target nowhere --data nowhere.jsonl --out out",
        "eval": "--target nowhere --head nowhere",
        "compare": "--model nowhere --head nowhere",
    }[command]
    assert main([*command.split(), *words.split(), "--chat-template-kwargs", value]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vllm-eagle: --chat-template-kwargs: {message}")
    assert error.count("\n") == 1


def test_what_a_caller_says_is_no_argument_of_a_template() -> None:
    named = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"self", "kwargs"}
    assert named <= RESERVED


@pytest.mark.parametrize("template", [None, MARKED])
def test_an_answer_that_was_cut_does_not_end(tokenizer: Any, write: Any, template: str | None) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    row = turns("a?", "A.", "b?", "B is")
    row["messages"][-1]["finish_reason"] = "length"
    [example, other], _ = load(tokenizer, write(row, turns("c?", "C.")))
    assert tokenizer.decode(example.token_ids).endswith("<|assistant|>\nB is")
    assert learnt(tokenizer, example) == "A.</s>B is"
    assert learnt(tokenizer, other) == "C.</s>"


def test_token_mask_leaves_out_trimmed_white_space_and_tokens_that_reach_in() -> None:
    # Two prompt tokens, the second trimmed to nothing at 4; one answer token trimmed to nothing; one beyond the end.
    assert token_mask([(0, 3), (4, 4), (4, 6), (7, 7), (7, 9), (9, 10)], [(4, 9)]).tolist() == [False, False, *[True] * 3, False]
    assert token_mask([(0, 5), (5, 6)], [(4, 6)]).tolist() == [False, True]
    assert token_mask([], []).shape == (0,)


def test_texts_are_cut_into_windows_between_bos_and_eos(tokenizer: Any, write: Any) -> None:
    text = "One two three four five six seven. " * 4
    whole = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    for length in range(3, len(whole) + 1):
        examples, report = load(tokenizer, write({"text": text}), max_length=length)
        rest = len(whole) % length
        joined = [token for example in examples for token in example.token_ids.tolist()]
        assert joined == (whole[:-rest] if 0 < rest < 3 else whole)
        assert {len(example.token_ids) for example in examples[:-1]} <= {length}
        assert report.num_loss_tokens == report.num_tokens == len(joined)


def test_long_dialogues_are_cut_and_left_out_without_an_answer(tokenizer: Any, write: Any) -> None:
    path = write(turns("a?", "A. " * 100), turns("a? " * 100, "A."))
    [example], report = load(tokenizer, path, max_length=50)
    whole = tokenizer.apply_chat_template(turns("a?", "A. " * 100)["messages"], return_dict=False)
    assert example.token_ids.tolist() == whole[:50]
    assert [(f.line, f.reason) for f in report.findings] == [(1, OVER_LONG), (2, "no loss token left")]
    assert f"{len(whole)} tokens, at most 50" in report.findings[0].detail
    assert report.num_tokens == 50


def test_turns_after_the_last_answer_are_dropped_without_a_word(tokenizer: Any, write: Any) -> None:
    examples, report = load(tokenizer, write(turns("a?", "A."), turns("a?", "A.", "b?")))
    assert examples[0].token_ids.tolist() == examples[1].token_ids.tolist()
    assert not report.counts


# Formats


@pytest.mark.parametrize(
    "row",
    [
        turns("a?", "A."),
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a?"}]}, {"role": "assistant", "content": "A."}]},
        sharegpt(("human", "a?"), ("gpt", "A.")),
        sharegpt(("user", "a?"), ("chatgpt", "A.")),
        sharegpt(("user", "a?"), ("assistant", "A.")),
        sharegpt(("human", "a?"), ("bot", "A.")),
        {"prompt": "a?", "prompt_id": 7, **turns("a?", "A.")},
    ],
)
def test_every_way_to_write_a_dialogue_gives_the_same_example(tokenizer: Any, write: Any, row: dict[str, Any]) -> None:
    [example], report = load(tokenizer, write(row))
    assert tokenizer.decode(example.token_ids) == "<s><|user|>\na?</s><|assistant|>\nA.</s>"
    assert learnt(tokenizer, example) == "A.</s>"
    assert not report.counts


def test_parts_system_and_tool_turns_reach_the_template(tokenizer: Any, write: Any) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "look up"},
        {"role": "tool", "content": "42"},
        {"role": "tool", "content": "43"},
        {"role": "assistant", "content": "A."},
    ]
    [example], _ = load(tokenizer, write({"messages": messages}))
    assert tokenizer.decode(example.token_ids) == (
        "<s><|system|>\nBe brief.</s><|user|>\na\nb</s>"
        "<|assistant|>\nlook up</s><|tool|>\n42</s><|tool|>\n43</s><|assistant|>\nA.</s>"
    )
    assert learnt(tokenizer, example) == "look up</s>A.</s>"


def test_files_of_every_kind(tokenizer: Any, write: Any, tmp_path: Path) -> None:
    rows = [turns("a?", "A."), turns("b?", "B.")]
    lines = write(*rows)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    array = write(json.dumps(rows, indent=1), name="array.json")
    lines_in_json = write(*rows, name="lines.json")
    marked = tmp_path / "bom.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + lines.read_bytes().replace(b"\n", b"\r\n"))
    expected = [example.token_ids.tolist() for example in load(tokenizer, lines)[0]]
    for path in (packed, array, lines_in_json, marked):
        examples, report = load(tokenizer, path)
        assert [example.token_ids.tolist() for example in examples] == expected, path
        assert not report.counts
    text = write("Hello\n\nworld", name="text.txt")
    [document], _ = load(tokenizer, text)
    assert tokenizer.decode(document.token_ids) == "<s>Hello\n\nworld\n</s>"
    everything, report = load(tokenizer, lines, packed, text)
    assert (len(everything), report.num_rows) == (5, 5)


# Bad rows

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"messages": [', "broken JSON"),
        (DEEP, "broken JSON"),
        ('{"text": 1' + "0" * 5000 + "}", "broken JSON"),
        (b'{"text": "\xff"}', "invalid UTF-8"),
        ('{"text": "\\ud800"}', "invalid UTF-8"),
        (["a"], "not an object"),
        ("null", "not an object"),
        ({"question": "a?"}, "unknown row shape"),
        ({"messages": "a?"}, "unknown row shape"),
        ({"messages": ["a?"]}, "unknown row shape"),
        ({"messages": []}, "no assistant turn"),
        (turns("a?"), "no assistant turn"),
        ({"messages": DIALOGUE[:2]}, "no assistant turn"),
        ({"prompt": "a?"}, "no answer"),
        (turns("a?", " \n"), "empty turn"),
        ({"text": ""}, "empty turn"),
        ({"text": None}, "non-string content"),
        ({"messages": [{"role": "user", "content": 7}]}, "non-string content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "non-string content"),
        ({"messages": [{"role": "user"}]}, "non-string content"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "unknown role"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "unknown role"),
        ({"messages": [{"content": "a"}]}, "unknown role"),
        (sharegpt(("gpt", "A."), ("human", "b?"), ("gpt", "B.")), "wrong role order"),
        (sharegpt(("human", "a?"), ("human", "b?"), ("gpt", "B.")), "wrong role order"),
        (sharegpt(("human", "a?"), ("gpt", "A."), ("gpt", "B.")), "wrong role order"),
        (sharegpt(("human", "a?"), ("tool", "42"), ("gpt", "B.")), "wrong role order"),
        (sharegpt(("human", "a?"), ("system", "Be brief."), ("gpt", "B.")), "wrong role order"),
        (sharegpt(("human", "a?"), ("system", "Be brief."), ("human", "b?"), ("gpt", "B.")), "wrong role order"),
        (sharegpt(("human", "a?"), ("gpt", "A."), ("tool", "42"), ("human", "b?"), ("gpt", "B.")), "wrong role order"),
        (sharegpt(("system", "Be brief."), ("gpt", "B.")), "wrong role order"),
        (sharegpt(("system", "Be brief."), ("system", "Be nice."), ("human", "a?"), ("gpt", "B.")), "wrong role order"),
        (sharegpt(("tool", "42"), ("gpt", "B.")), "wrong role order"),
        ({"messages": [*DIALOGUE[:2], {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "tool calls"),
        (
            {"messages": [*DIALOGUE[:2], {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}]},
            "reasoning in its own field",
        ),
        (turns("a?", "A.") | {"images": ["a.png"]}, "not shown by chat templates"),
        (turns("a?", "A.") | {"audio": {"path": "a.wav"}}, "not shown by chat templates"),
        ({"text": "a", "images": ["a.png"]}, "not shown by chat templates"),
        ({"messages": [{"role": "user", "content": "a?", "images": ["a"]}, DIALOGUE[2]]}, "not shown by chat templates"),
        (turns("a?", "A.") | {"functions": [{"name": "f"}]}, "not shown by chat templates"),
        (turns("a?", "A.") | {"tools": "no JSON"}, "tools are no list of objects"),
        (turns("a?", "A.") | {"tools": {"name": "f"}}, "tools are no list of objects"),
        (turns("a?", "A.") | {"chat_template_kwargs": "x"}, "template arguments are no object"),
        (turns("a?", "A.") | {"chat_template_kwargs": {"tools": []}}, "template arguments that are none"),
        (turns("a?", "A.") | {"system": ["x"]}, "non-string content"),
        ({"messages": DIALOGUE, "system": "Be long."}, "two system prompts"),
        ({"text": "a", "system": "Be brief."}, "system prompt or tools beside plain text"),
        ({"text": "a", "tools": [{"name": "f"}]}, "system prompt or tools beside plain text"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.islower() else "row",
)
def test_a_bad_row_is_reported_and_its_neighbours_are_used(tokenizer: Any, write: Any, row: Any, reason: str) -> None:
    examples, report = load(tokenizer, path := write(turns("a?", "A."), "", row, turns("b?", "B.")))
    assert [learnt(tokenizer, example) for example in examples] == ["A.</s>", "B.</s>"]
    assert [(f.file, f.line, f.reason) for f in report.findings] == [(str(path), 3, reason)]
    assert report.num_rows == 3


def test_rows_of_a_json_array_are_counted_from_one(tokenizer: Any, write: Any) -> None:
    path = write([turns("a?", "A."), {"x": 1}, turns("b?", "B.")], name="array.json")
    examples, report = load(tokenizer, path)
    assert len(examples) == 2
    assert [(f.line, f.reason) for f in report.findings] == [(2, "unknown row shape")]


def test_a_torn_gzip_file_gives_the_rows_before_the_tear(tokenizer: Any, tmp_path: Path) -> None:
    # Random contents: what is packed is torn somewhere in the middle of the rows.
    rows = b"".join(json.dumps(turns("a?", os.urandom(30).hex())).encode() + b"\n" for _ in range(1000))
    packed = gzip.compress(rows)
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(packed[: len(packed) // 2])
    examples, report = load(tokenizer, path)
    assert 100 < len(examples) < 900
    assert report.counts == {"broken gzip": 1}
    assert report.findings[0].line == len(examples) + 1
    path.write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="broken gzip"):
        load(tokenizer, path)


@pytest.mark.parametrize("body", [HEADER + "{{ m['content'] + eos_token }}{% endfor %}" + PROMPT, MARKED])
def test_a_template_that_refuses_a_row_does_not_stop_the_others(tokenizer: Any, write: Any, body: str) -> None:
    tokenizer.chat_template = NO_SYSTEM + body
    path = write(turns("a?", "A."), {"messages": DIALOGUE}, turns("b?", "B."))
    examples, report = load(tokenizer, path)
    assert [learnt(tokenizer, example) for example in examples] == ["A.</s>", "B.</s>"]
    assert [(f.line, f.reason) for f in report.findings] == [(2, "template error")]
    assert "no system turns" in report.findings[0].detail


def test_a_template_that_marks_nothing_leaves_nothing_to_learn(tokenizer: Any, write: Any) -> None:
    tokenizer.chat_template = "{% if false %}{% generation %}{% endgeneration %}{% endif %}" + tokenizer.chat_template
    with pytest.raises(ValueError, match=r"no loss token left.*the chat template marks no answer"):
        load(tokenizer, write(turns("a?", "A.")))


# Errors and reports


def test_dialogues_need_a_chat_template_before_anything_is_tokenised(tokenizer: Any, write: Any) -> None:
    tokenizer.chat_template = None
    path = write({"text": "first"}, turns("a?", "A."))
    calls = []
    tokenise = type(tokenizer).__call__

    class Counting(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return tokenise(self, *args, **kwargs)

    tokenizer.__class__ = Counting
    with pytest.raises(ValueError, match="no chat template") as caught:
        load(tokenizer, path)
    assert f"{path}:2" in str(caught.value)
    assert "chat_template.jinja" in str(caught.value)
    assert str(TARGET) in str(caught.value)
    assert not calls
    assert len(load(tokenizer, write({"text": "first"}))[0]) == len(calls) == 1


def test_files_that_cannot_be_data_are_refused_by_name(tokenizer: Any, write: Any, tmp_path: Path) -> None:
    good = write(turns("a?", "A."))
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such file"):
        load(tokenizer, good, tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match=r"table\.parquet: unknown kind of data file; use \.jsonl"):
        load(tokenizer, good, write("x", name="table.parquet"))
    with pytest.raises(ValueError, match="max_length is 2"):
        load(tokenizer, good, max_length=2)


def test_nothing_usable_says_what_was_wrong(tokenizer: Any, write: Any) -> None:
    path = write({"prompt": "a?"}, {"prompt": "b?"}, "{", name="prompts.jsonl")
    with pytest.raises(ValueError, match="no usable row") as caught:
        load(tokenizer, path)
    assert f"2 x no answer: {path}:1 (regenerate first), {path}:2" in str(caught.value)
    assert f"1 x broken JSON: {path}:3" in str(caught.value)


def test_the_report_counts_by_reason_and_shows_the_first_three(tmp_path: Path) -> None:
    report = DataReport()
    report.num_rows = 6
    for line in (2, 3, 5, 9):
        report.add("a.jsonl", line, "empty turn", f"turn {line}")
    report.add(Path("b.jsonl"), 4, OVER_LONG)
    assert report.summary().splitlines()[1:] == [
        "  left out: 4 x empty turn: a.jsonl:2 (turn 2), a.jsonl:3 (turn 3), a.jsonl:5 (turn 5), ...",
        f"  kept: 1 x {OVER_LONG}: b.jsonl:4",
    ]
    assert report.as_dict()["counts"] == report.counts == {"empty turn": 4, OVER_LONG: 1}
    report.write(tmp_path / "findings.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "findings.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert lines[1] == {"file": "a.jsonl", "line": 3, "reason": "empty turn", "detail": "turn 3"}


def test_chunks_keep_every_row_and_its_line(tokenizer: Any, write: Any) -> None:
    """More rows than one call of the tokenizer takes, with a text and a bad row in each chunk."""
    rows: list[Any] = [turns(f"{i}?", f"{i}.") for i in range(2 * CHUNK + 5)]
    rows[3] = rows[CHUNK + 3] = {"text": "some text"}
    rows[7] = rows[CHUNK + 9] = {}
    examples, report = load(tokenizer, write(*rows))
    answers = {learnt(tokenizer, example) for example in examples}
    assert answers == {f"{i}.</s>" for i in range(len(rows)) if i not in (3, 7, CHUNK + 3, CHUNK + 9)} | {"<s>some text</s>"}
    assert [f.line for f in report.findings] == [8, CHUNK + 10]
    assert report.num_examples == len(examples) == len(rows) - 2


def test_file_hash_is_that_of_the_contents_in_order(write: Any) -> None:
    a, b = write("a", name="a.jsonl"), write("b", name="b.jsonl")
    assert file_hash([a, b]) == hashlib.sha256(b"a\nb\n").hexdigest()
    assert file_hash([b, a]) != file_hash([a, b])
