"""Prompts of a file: what is asked, and none of the answers. All commands that take `--prompts` read it here.

    {"messages": [{"role": "user", "content": "..."}, ...]}       OpenAI chat, without answers at its end
    {"conversations": [{"from": "human", "value": "..."}, ...]}   ShareGPT, up to the first answer
    {"turns": ["...", "..."]}                                     question.jsonl of MT-bench and Spec-Bench, the first turn
    {"prompt": "..."}, {"text": "..."}                            plain text, to be continued

Beside it a row may say which kind of question it is, `"kind": "..."`: `eval` and `compare` then report each kind apart. "system",
"tools" and "chat_template_kwargs" of a row are as in rows.py. .jsonl files hold one row per line, .json files one array of rows (or
lines, too); each may be gzipped.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_eagle.train.data.report import DataReport
from vllm_eagle.train.data.rows import (
    ROLES,
    Message,
    RowError,
    check_plain,
    parse_content,
    parse_messages,
    parse_options,
    parse_system,
    raw_rows,
    refuse_unseen,
)

ACCEPTED = '"messages", "conversations" (ShareGPT), "turns" (MT-bench), "prompt" or "text"'


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a row asks."""

    line: int  # from 1; in a .json array the number of the row
    asked: str | list[Message]  # a text to go on with, or a dialogue that ends where an answer is due
    options: dict[str, Any] = field(default_factory=dict)  # for the chat template
    kind: str | None = None


def read_prompts(path: Path) -> Iterator[Prompt]:
    """Prompts of a file, in order. Unlike in training, one bad row ends the run.

    Raises:
        ValueError: the file is missing, or a row holds no prompt or a kind that is no text; the message names file and line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if ".txt" in path.suffixes:
        raise ValueError(f"{path}: a file of prompts is .jsonl or .json; each of its rows has {ACCEPTED}")
    report = DataReport()  # of a torn file, the only thing that does not come as a row
    for line, raw in raw_rows(path, report):
        if isinstance(raw, RowError):
            raise ValueError(f"{path}, line {line}: no JSON: {raw.reason} ({raw.detail})")
        if not isinstance(raw, dict) or raw.keys().isdisjoint(("messages", "conversations", "turns", "prompt", "text")):
            raise ValueError(f"{path}, line {line}: a row needs {ACCEPTED}{_found(raw)}")
        try:
            yield _prompt(line, raw)
        except RowError as error:
            detail = f" ({error.detail})" if error.detail else ""
            raise ValueError(f"{path}, line {line}: {error.reason}{detail}") from None
    for finding in report.findings:
        raise ValueError(f"{path}, line {finding.line}: {finding.reason} ({finding.detail})")


def _found(raw: Any) -> str:
    if not isinstance(raw, dict):
        return f"; this one is no object but {type(raw).__name__}"
    return f"; this one has {', '.join(map(str, raw))[:80] or 'nothing'}"


def _kind(row: dict[str, Any]) -> str | None:
    if "kind" not in row:
        return None
    kind = row["kind"]
    if not isinstance(kind, str) or not kind.strip():
        raise RowError('"kind" is no text', f"{kind!r}"[:80])
    return parse_content(kind, "kind")


def _prompt(line: int, row: dict[str, Any]) -> Prompt:
    options, asked, kind = parse_options(row), _asked(row), _kind(row)
    if isinstance(asked, str):
        check_plain(row, options)
        return Prompt(line, asked, kind=kind)
    return Prompt(line, [*parse_system(row, asked), *asked], options, kind)


def _asked(row: dict[str, Any]) -> str | list[Message]:
    if "messages" in row:
        messages: list[Message] = row["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(turn, dict) for turn in messages):
            raise RowError("unknown row shape", '"messages" is no list of objects, or an empty one')
        while messages and messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        if not messages:
            raise RowError("no user turn", "there is nothing to answer")
        return [_as_text(turn, f"turn {i}") for i, turn in enumerate(messages, start=1)]
    if "conversations" in row:
        return _up_to_the_first_answer(row["conversations"])
    if "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns:
            raise RowError("unknown row shape", '"turns" is no list of texts, or an empty one')
        return [{"role": "user", "content": parse_content(turns[0], "turn 1")}]
    key = "prompt" if "prompt" in row else "text"
    return parse_content(row[key], key)


def _as_text(turn: dict[str, Any], where: str) -> Message:
    """A turn whose content is no list of parts; all else is the template's concern."""
    refuse_unseen(turn, where)
    return turn | {"content": parse_content(turn["content"], where)} if isinstance(turn.get("content"), list) else turn


def _up_to_the_first_answer(turns: Any) -> list[Message]:
    """What comes later is not looked at: it may be as broken as scraped dialogues are."""
    asked: list[Any] = []
    for turn in turns if isinstance(turns, list) else [turns]:
        name = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        if asked and isinstance(name, str) and ROLES.get(name) == "assistant":
            break
        asked.append(turn)
    messages = parse_messages(asked)
    if messages[-1]["role"] != "user":
        raise RowError("no user turn", "nothing is asked before the first answer")
    return messages
