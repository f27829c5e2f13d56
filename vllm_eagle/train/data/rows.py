"""Rows of data files: what a row says, checked before any tokenizer sees it.

    {"messages": [{"role": "user", "content": "..."}, ...]}          OpenAI chat
    {"conversations": [{"from": "human", "value": "..."}, ...]}      ShareGPT
    {"text": "..."}                                                  plain text
    {"prompt": "..."}                                                a question without an answer

Beside a dialogue a row may have "system" (a text that stands before it), "tools" (a list, or JSON text of one) and
"chat_template_kwargs" (an object): they go to the chat template. An answer with "finish_reason" is the target's own, word for word;
"length" says that it stops in the middle. A row with anything else for the target to see, such as images, is left out.

.jsonl files hold one row per line, .json files one array of rows (or lines, too), .txt files one plain text; each may be gzipped.
A row that breaks the rules is reported and left out, it never stops a run.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_eagle.train.data.report import DataReport

Message = dict[str, str]  # "role" (system, user, assistant or tool) and "content"; of the target's own answers "finish_reason", too

SUFFIXES = (".jsonl", ".json", ".txt")
ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name, which few chat templates know
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "tool": "tool",
}
FINISHED = ("stop", "length")  # reasons to finish that are heeded
ARGUMENTS = "chat_template_kwargs"
# What whoever calls a template says, and no row or option.
RESERVED = {
    *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    "tokenizer_kwargs",
}
UNSEEN = ("images", "image", "videos", "video", "audios", "audio", "functions")  # no template here shows them
BEFORE = {  # what may stand before a turn; "" is the start of the dialogue
    "system": {""},
    "user": {"", "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}


@dataclass(frozen=True, slots=True)
class Row:
    """A usable row: a dialogue or a plain text."""

    path: Path
    line: int  # from 1; in a .json array the number of the row
    messages: list[Message] | None = None  # in an allowed order, none empty
    text: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # for the chat template: tools, and its arguments
    is_prompt: bool = False  # a "prompt": its one user turn is all there is


class RowError(ValueError):
    """A row that cannot be used."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def check_files(paths: list[Path]) -> None:
    """Complain about files that cannot be read at all.

    Raises:
        ValueError: a file is missing, or its name says that it holds something else.
    """
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        if _kind(path) not in SUFFIXES:
            raise ValueError(f"{path}: unknown kind of data file; use {', '.join(SUFFIXES)}, or one of these with .gz")


def iter_rows(path: Path, report: DataReport) -> Iterator[Row]:
    """Usable rows of one file; `report` gets the others. Answers are not required."""
    for line, raw in raw_rows(path, report):
        report.num_rows += 1
        try:
            yield _parse(path, line, raw)
        except RowError as error:
            report.add(path, line, error.reason, error.detail)


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def raw_rows(path: Path, report: DataReport) -> Iterator[tuple[int, Any]]:
    """Line number and JSON value, or RowError, of every row; `report` gets a gzip file that is torn."""
    if _kind(path) == ".jsonl":
        for number, line in _lines(path, report):
            if line.strip():
                yield number, _decode_json(line)
        return
    lines = dict(_lines(path, report))
    whole = b"".join(lines.values())
    if _kind(path) == ".txt":
        yield 1, _decode_text(whole)
    elif not whole.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from ((number, _decode_json(line)) for number, line in lines.items() if line.strip())
    elif isinstance(rows := _decode_json(whole), RowError):
        yield 1, rows
    else:
        yield from enumerate(rows, start=1)


def _lines(path: Path, report: DataReport) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        report.add(path, number + 1, "broken gzip", f"this line and all after it: {error}")


def _decode_text(raw: bytes) -> dict[str, str] | RowError:
    try:
        return {"text": raw.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        return RowError("invalid UTF-8", f"byte {error.start}")


def _decode_json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RowError("invalid UTF-8", f"byte {error.start}")
    except (ValueError, RecursionError) as error:
        return RowError("broken JSON", str(error))


def _parse(path: Path, line: int, raw: Any) -> Row:
    if isinstance(raw, RowError):
        raise raw
    if not isinstance(raw, dict):
        raise RowError("not an object", type(raw).__name__)
    options = parse_options(raw)
    for key in ("messages", "conversations"):
        if key in raw:
            return Row(path, line, messages=[*parse_system(raw, raw[key]), *parse_messages(raw[key])], options=options)
    if "text" in raw:
        text = parse_content(raw["text"], "text")
        check_plain(raw, options)
        return Row(path, line, text=text)
    if "prompt" in raw:
        question = {"role": "user", "content": parse_content(raw["prompt"], "prompt")}
        return Row(path, line, messages=[*parse_system(raw, []), question], options=options, is_prompt=True)
    raise RowError("unknown row shape", f"keys {', '.join(map(str, raw))[:80]}; needs messages, conversations or text")


def parse_options(raw: dict[str, Any]) -> dict[str, Any]:
    """What a row gives to the chat template beside its messages, as arguments of `apply_chat_template`.

    Raises:
        RowError: it cannot be given, or is for the target to see and no text.
    """
    refuse_unseen(raw, "the row")
    tools = raw.get("tools") or None
    if isinstance(tools, str):  # as LLaMA-Factory writes them
        with suppress(ValueError):
            tools = json.loads(tools)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError("tools are no list of objects", str(tools)[:80])
    arguments = checked_arguments(raw[ARGUMENTS]) if raw.get(ARGUMENTS) is not None else {}
    return arguments | ({"tools": tools} if tools else {})


def checked_arguments(found: Any) -> dict[str, Any]:
    """Arguments of a chat template.

    Raises:
        RowError: no JSON object, or it sets what is said otherwise.
    """
    if not isinstance(found, dict):
        raise RowError("template arguments are no object", type(found).__name__)
    if reserved := RESERVED & found.keys():
        raise RowError("template arguments that are none", ", ".join(sorted(reserved)))
    return found


def parse_system(raw: dict[str, Any], turns: Any) -> list[Message]:
    """The row's own system prompt as a message, to stand before `turns`; none if it has none, or they begin with it.

    Raises:
        RowError: it is no text, or they begin with another one.
    """
    found = raw.get("system") or raw.get("system_prompt")
    if not found or (isinstance(found, str) and not found.strip()):
        return []
    system = {"role": "system", "content": parse_content(found, "system")}
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    name = first.get("role", first.get("from"))
    if isinstance(name, str) and ROLES.get(name) == "system":
        if first.get("content", first.get("value")) == found:
            return []
        raise RowError("two system prompts", "one beside the dialogue, one in it")
    return [system]


def check_plain(raw: dict[str, Any], options: dict[str, Any]) -> None:
    """Refuse a plain text with what only a dialogue can have.

    Raises:
        RowError: it has a system prompt or tools.
    """
    if options or raw.get("system") or raw.get("system_prompt"):
        raise RowError("system prompt or tools beside plain text", 'no chat template is there to show them; write "messages"')


def refuse_unseen(found: dict[str, Any], where: str) -> None:
    """Refuse a row or a turn with what the target was meant to see and cannot.

    Raises:
        RowError: it has images or the like.
    """
    for key in UNSEEN:
        if found.get(key):
            raise RowError("not shown by chat templates", f"{key} of {where}")


def parse_messages(turns: Any) -> list[Message]:
    """A dialogue with the roles that templates know.

    Raises:
        RowError: a turn is no text, or stands where it may not.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError("unknown row shape", "the dialogue is no list of objects")
    messages: list[Message] = []
    before = ""
    for i, turn in enumerate(turns, start=1):
        name = turn.get("role", turn.get("from"))
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise RowError("unknown role", f"turn {i}: {name!r}"[:80])
        if turn.get("tool_calls") or turn.get("function_call"):
            raise RowError("tool calls", f"turn {i}: only text can be trained on")
        if turn.get("reasoning_content") or turn.get("reasoning") or turn.get("thinking"):
            raise RowError("reasoning in its own field", f"turn {i}: write it into content, as the target's template does")
        refuse_unseen(turn, f"turn {i}")
        content = parse_content(turn.get("content", turn.get("value")), f"turn {i}")
        if before not in BEFORE[role]:
            raise RowError("wrong role order", f"turn {i}: {role} after {before}" if before else f"starts with {role}")
        messages.append({"role": role, "content": content})
        if role == "assistant" and turn.get("finish_reason") in FINISHED:
            messages[-1]["finish_reason"] = turn["finish_reason"]
        before = role
    if not messages:
        raise RowError("no assistant turn", "empty dialogue")
    return messages


def parse_content(value: Any, where: str) -> str:
    """The text of a turn. Parts are joined as vLLM's server joins them for a template that wants a string.

    Raises:
        RowError: there is none.
    """
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        value = "\n".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise RowError("non-string content", where)
    if not value.strip():
        raise RowError("empty turn", where)
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair; tokenizers refuse it
        raise RowError("invalid UTF-8", f"{where}: half a surrogate pair") from None
    return value
