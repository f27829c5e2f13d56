"""Files of prompts: what is asked in each kind of row, and what is said about rows that ask nothing."""

import gzip
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from vllm_eagle.bench.engines.offline import BUILT_IN_PROMPTS, encode_prompts, encode_with_kinds, places_by_kind
from vllm_eagle.bench.passes import compare
from vllm_eagle.cli import main
from vllm_eagle.pair import TARGET
from vllm_eagle.train.data.prompts import Prompt, read_prompts
from vllm_eagle.train.data.rows import Message

SIX_KINDS = BUILT_IN_PROMPTS.with_name("six_kinds.jsonl")
QUESTION = [{"role": "user", "content": "a?"}]
BRIEF = [{"role": "system", "content": "Be brief."}, *QUESTION]


def write(folder: Path, *rows: Any, name: str = "prompts.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question_id": 81, "category": "writing", "turns": ["a?", "b?"], "reference": ["A.", "B."]}, QUESTION),
        ({"id": "x", "conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "A."}]}, QUESTION),
        ({"conversations": [{"from": "human", "value": "a?"}]}, QUESTION),
        # What scraped dialogues hold after the first answer does not matter.
        ({"conversations": [{"from": "user", "value": "a?"}, {"from": "gpt", "value": ""}, {"from": "gpt", "value": 7}]}, QUESTION),
        ({"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "a?"}]}, BRIEF),
        ({"messages": BRIEF}, BRIEF),
        ({"messages": [*BRIEF, {"role": "assistant", "content": "A."}]}, BRIEF),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "A."}, *QUESTION], "prompt": "a?"}, None),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a?"}]}]}, QUESTION),
        ({"prompt": "a"}, "a"),
        ({"text": "a"}, "a"),
    ],
)
def test_what_a_row_asks(tmp_path: Path, row: dict[str, Any], prompt: Any) -> None:
    asked = prompt or row["messages"]
    assert list(read_prompts(write(tmp_path, row, "", row))) == [Prompt(1, asked), Prompt(3, asked)]


def test_files_of_every_kind(tmp_path: Path) -> None:
    rows = [{"turns": ["a?"]}, {"prompt": "a"}]
    lines = write(tmp_path, *rows)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    array = write(tmp_path, json.dumps(rows, indent=1), name="array.json")
    for path in (lines, packed, array, write(tmp_path, *rows, name="lines.json")):
        assert [prompt.asked for prompt in read_prompts(path)] == [QUESTION, "a"], path


def test_questions_of_mt_bench_go_through_the_template(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    asked, written = encode_prompts(str(TARGET), write(tmp_path, {"question_id": 81, "turns": ["a?", "b?"]}, {"prompt": "a?"}))
    assert tokenizer.decode(asked) == "<s><|user|>\na?</s><|assistant|>\n"
    assert tokenizer.decode(written) == tokenizer.decode(tokenizer("a?")["input_ids"])


def test_kinds_stand_beside_their_prompts(tmp_path: Path) -> None:
    path = write(tmp_path, {"kind": "math", "prompt": "1 + 1 ="}, {"prompt": "a"}, {"messages": QUESTION, "kind": "chat"})
    assert [prompt.kind for prompt in read_prompts(path)] == ["math", None, "chat"]
    prompts, kinds = encode_with_kinds(str(TARGET), path)
    assert kinds == ["math", None, "chat"]
    assert prompts == encode_prompts(str(TARGET), path)
    assert encode_with_kinds(str(TARGET), path, 2) == (prompts[:2], kinds[:2])
    assert places_by_kind(["b", None, "a", "b"]) == {"b": [0, 3], None: [1], "a": [2]}


def test_six_kinds() -> None:
    """They take turns, for `--limit`. Under 300 tokens each by the shipped tokenizer, which makes more of a text than most."""
    prompts, kinds = encode_with_kinds(str(TARGET), SIX_KINDS)
    assert Counter(kinds) == dict.fromkeys(("chat", "math", "code", "summary", "translation", "context"), 32)
    assert all(len(set(kinds[first : first + 6])) == 6 for first in range(0, len(kinds), 6))
    assert max(map(len, prompts)) < 300
    asked = [messages_of(prompt) for prompt in read_prompts(SIX_KINDS)]
    last = [" ".join(messages[-1]["content"].lower().split()) for messages in asked]
    assert len(set(last)) == len(last) == 192
    assert not set(last) & {
        " ".join(messages_of(prompt)[-1]["content"].lower().split()) for prompt in read_prompts(BUILT_IN_PROMPTS)
    }
    roles = Counter(tuple(message["role"] for message in messages) for messages in asked)
    assert roles.keys() == {("user",), ("system", "user")}
    assert roles["system", "user"] <= 8


def messages_of(prompt: Prompt) -> list[Message]:
    assert not isinstance(prompt.asked, str)
    return prompt.asked


def test_all_of_a_row_reaches_the_template(tmp_path: Path) -> None:
    target = shutil.copytree(TARGET, tmp_path / "target", ignore=shutil.ignore_patterns("*.safetensors"))
    template = (target / "chat_template.jinja").read_text()
    (target / "chat_template.jinja").write_text("{% if tools %}{{ tools[0].name }}{% endif %}{{ style or '' }}" + template)
    beside = {"system": "Be brief.", "tools": [{"name": "add"}]}
    styled = {"chat_template_kwargs": {"style": " row "}}
    shapes = ({"turns": ["a?"]}, {"messages": QUESTION}, {"conversations": [{"from": "human", "value": "a?"}]})
    path = write(tmp_path, *(row | beside for row in shapes), shapes[0] | styled, shapes[0])
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    prompts = [tokenizer.decode(ids) for ids in encode_with_kinds(str(target), path, arguments={"style": " run "})[0]]
    assert prompts[:3] == ["add run <s><|system|>\nBe brief.</s><|user|>\na?</s><|assistant|>\n"] * 3
    assert prompts[3:] == [f" {style} <s><|user|>\na?</s><|assistant|>\n" for style in ("row", "run")]


def test_prompts_that_the_model_cannot_take_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = shutil.copytree(TARGET, tmp_path / "target", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(target)
    size = config["vocab_size"]
    path = write(tmp_path, {"turns": ["a?"]}, {"turns": ["word " * 60]}, {"prompt": "[PAD]"}, {"prompt": "b"})
    prompts = encode_prompts(str(target), path, max_tokens=20)
    assert [tokenizer.decode(ids) for ids in prompts] == ["<s><|user|>\na?</s><|assistant|>\n", "<s>b"]
    long = len(tokenizer.apply_chat_template([{"role": "user", "content": "word " * 60}], add_generation_prompt=True)["input_ids"])
    assert capsys.readouterr().err.splitlines() == [
        f"  left out: 1 x too long: {path}:2 ({long} tokens and 20 to come, the target takes 64)",
        f"  left out: 1 x token outside the target's vocabulary: {path}:3 ([PAD] is number {size} of {size})",
    ]
    assert len(encode_prompts(str(target), path, limit=1)) == 1
    with pytest.raises(
        ValueError, match=r"holds no prompts that can be used;  left out: 3 x too long.*the target takes 64"
    ) as caught:
        encode_prompts(str(target), path, max_tokens=64)
    assert "\n" not in str(caught.value)


def test_long_contexts_hold_the_texts_of_other_prompts(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    alone, long = (encode_prompts(str(TARGET), None, max_tokens=65, context_tokens=tokens) for tokens in (None, 1500))
    assert max(map(len, alone)) < 300
    assert len(long) == len(alone)
    assert all(1500 - 300 < len(ids) <= 1500 for ids in long)
    for i, ids in enumerate(long):
        question, following = (tokenizer.decode(x).split("<|user|>\n")[1] for x in (alone[i], alone[(i + 1) % len(alone)]))
        text = tokenizer.decode(ids).split("<|user|>\n")[1]
        assert text.endswith("\n\n" + question)
        assert text.startswith(following.split("</s>")[0])
    # As far as the target has positions.
    assert all(2048 - 65 - 300 < len(ids) <= 2048 - 65 for ids in encode_prompts(str(TARGET), None, 4, 65, 5000))
    with pytest.raises(ValueError, match=r"contexts of 1500 tokens .* these have \d+; give --prompts with more of them"):
        encode_prompts(str(TARGET), write(tmp_path, {"turns": ["a?"]}, {"prompt": "b"}), context_tokens=1500)


def test_compare_runs_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, {"turns": ["word " * 3000]}, {"turns": ["a?"]}, {"turns": ["b?"]})
    given: list[list[list[int]]] = []

    def measure(settings: compare.Settings, prompts: list[list[int]], chosen: object, kinds: object) -> dict[str, int]:
        given.append(prompts)
        return {"prompts": len(prompts), "identical": len(prompts)}

    monkeypatch.setattr(compare, "measure", measure)
    assert main(["compare", "--prompts", str(path), "--max-tokens", "8"]) == 0
    assert [len(prompts) for prompts in given] == [2]
    assert f"left out: 1 x too long: {path}:1 (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt"', "no JSON: broken JSON"),
        (
            "[1, 2]",
            'a row needs "messages", "conversations" (ShareGPT), "turns" (MT-bench), "prompt" or "text"; this one is no object',
        ),
        ({"question": "a?", "id": 1}, '"prompt" or "text"; this one has question, id'),
        ({"turns": []}, 'unknown row shape ("turns" is no list of texts, or an empty one)'),
        ({"turns": "a?"}, 'unknown row shape ("turns" is no list of texts, or an empty one)'),
        ({"turns": [7]}, "non-string content (turn 1)"),
        ({"turns": [" ", "b?"]}, "empty turn (turn 1)"),
        ({"messages": []}, '"messages" is no list of objects, or an empty one'),
        ({"messages": "a?"}, '"messages" is no list of objects, or an empty one'),
        ({"conversations": [{"from": "gpt", "value": "A."}]}, "wrong role order (starts with assistant)"),
        ({"conversations": []}, "empty dialogue"),
        ({"conversations": "a?"}, "the dialogue is no list of objects"),
        ({"conversations": [{"from": "system", "value": "Be brief."}, {"from": "gpt", "value": "A."}]}, "nothing is asked"),
        ({"prompt": None}, "non-string content (prompt)"),
        ({"prompt": "a?", "kind": 7}, '"kind" is no text (7)'),
        ({"prompt": "a?", "kind": None}, '"kind" is no text (None)'),
        ({"messages": QUESTION, "kind": ["math"]}, "\"kind\" is no text (['math'])"),
        ({"prompt": "a?", "kind": " "}, "\"kind\" is no text (' ')"),
        ({"prompt": "a?", "kind": "\ud800"}, "invalid UTF-8 (kind: half a surrogate pair)"),
        ({"prompt": "a", "system": "Be brief."}, "system prompt or tools beside plain text"),
        ({"turns": ["a?"], "images": ["a.png"]}, "not shown by chat templates (images of the row)"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "non-string content (turn 1)"),
        ({"messages": [{"role": "user", "content": "a?", "images": ["a"]}]}, "not shown by chat templates (images of turn 1)"),
        ({"turns": ["a?"], "tools": "f"}, "tools are no list of objects (f)"),
        ({"messages": BRIEF, "system": "Be long."}, "two system prompts"),
    ],
)
def test_a_row_without_a_prompt_ends_the_run(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path, {"prompt": "a"}, row, {"prompt": "b"})
    with pytest.raises(ValueError, match="line 2") as caught:
        list(read_prompts(path))
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert message in str(caught.value)


def test_files_without_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such file"):
        list(read_prompts(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match=r"text\.txt: a file of prompts is \.jsonl or \.json"):
        list(read_prompts(write(tmp_path, "a?", name="text.txt")))
    with pytest.raises(ValueError, match="holds no prompts"):
        encode_prompts(str(TARGET), write(tmp_path, ""))
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 9)[:-12])
    with pytest.raises(ValueError, match="broken gzip"):
        list(read_prompts(torn))
