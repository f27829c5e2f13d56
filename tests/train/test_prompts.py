"""Files of prompts: what is asked in each kind of row, and what is said about rows that ask nothing."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from vllm_eagle.bench.engines.offline import encode_prompts
from vllm_eagle.pair import TARGET
from vllm_eagle.train.data.prompts import read_prompts

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
        ({"prompt": "a"}, "a"),
        ({"text": "a"}, "a"),
    ],
)
def test_what_a_row_asks(tmp_path: Path, row: dict[str, Any], prompt: Any) -> None:
    assert list(read_prompts(write(tmp_path, row, "", row))) == [prompt or row["messages"]] * 2


def test_files_of_every_kind(tmp_path: Path) -> None:
    rows = [{"turns": ["a?"]}, {"prompt": "a"}]
    lines = write(tmp_path, *rows)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    array = write(tmp_path, json.dumps(rows, indent=1), name="array.json")
    for path in (lines, packed, array, write(tmp_path, *rows, name="lines.json")):
        assert list(read_prompts(path)) == [QUESTION, "a"], path


def test_questions_of_mt_bench_go_through_the_template(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    asked, written = encode_prompts(str(TARGET), write(tmp_path, {"question_id": 81, "turns": ["a?", "b?"]}, {"prompt": "a?"}))
    assert tokenizer.decode(asked) == "<s><|user|>\na?</s><|assistant|>\n"
    assert tokenizer.decode(written) == tokenizer.decode(tokenizer("a?")["input_ids"])


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
