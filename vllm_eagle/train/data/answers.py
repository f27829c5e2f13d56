"""Where the assistant's answers stand in a dialogue, as rendered by the chat template and as tokens.

A template that marks answers with `{% generation %}` says so itself. With any other the dialogue is rendered up to each answer:
what a longer rendering adds is the answer and its end of turn. Templates that rewrite turns (drop their reasoning, open a new one
in the prompt) break that rule. An answer that is not in the whole rendering as the target writes it becomes an example of its own:
the prompt as the target sees it, the answer, and what ends it.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vllm_eagle.train.data.rows import Message
from vllm_eagle.train.data.template import ChatTemplate

_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
# A prompt that ends so, with "<think>" or "[THINK]", has begun what the answer goes on with.
_OPENING = re.compile(r"([<\[])([^<>\[\]/\s]+)([>\]])\s*\Z")
_ANSWER = "vllmeagleanswer"  # stands for an answer; no template says it itself
MANY = 64  # turns; the answers of longer dialogues are looked for only as far as they are trained on


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Messages that end with an answer."""

    messages: list[Message]
    options: dict[str, Any] = field(default_factory=dict)  # for the chat template


@dataclass(frozen=True, slots=True)
class Encoded:
    """A dialogue, or one answer of it and all before it, as tokens."""

    token_ids: list[int]
    loss_mask: torch.Tensor  # [length] bool, the tokens of answers
    num_missed: int = 0  # characters of answers in tokens that begin before them or end behind them, so that no loss is on them


@dataclass(frozen=True, slots=True)
class Encodings:
    """What there is to learn from a dialogue."""

    texts: list[Encoded]
    num_lost: int = 0  # answers that the template changed beyond recognition


@dataclass(slots=True)
class _Text:
    text: str
    spans: list[tuple[int, int]]  # characters [start, end) of answers, with what ends them


class Dialogues:
    """Encodes dialogues and marks the tokens of answers.

    Args:
        template: of a fast tokenizer.
        max_length: tokens beyond which nothing is trained on.
    """

    def __init__(self, template: ChatTemplate, max_length: int):
        self._template, self._max_length = template, max_length
        self._tokenizer = template.tokenizer
        self._marked = _GENERATION.search(str(self._tokenizer.chat_template)) is not None
        self._end = self._end_of_turn()

    def encode(self, dialogues: list[Dialogue]) -> list[Encodings | str]:
        """Per dialogue what to learn, or what the template complained of."""
        rendered: list[tuple[list[_Text], int] | str] = []
        for dialogue in dialogues:
            try:
                rendered.append(self._texts(dialogue))
            except Exception as error:  # a template is a program of the model's author and may raise anything
                rendered.append(" ".join(f"{type(error).__name__}: {error}".split())[:200])
        encoded = iter(self._tokenise([text for found in rendered if not isinstance(found, str) for text in found[0]]))
        return [
            found if isinstance(found, str) else Encodings([next(encoded) for _ in found[0]], num_lost=found[1])
            for found in rendered
        ]

    def _tokenise(self, texts: list[_Text]) -> list[Encoded]:
        # The tokenizer refuses an empty batch.
        strings = [text.text for text in texts] or [""]
        out = self._tokenizer(strings, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        results = []
        for text, ids, offsets in zip(texts, out["input_ids"], out["offset_mapping"], strict=False):
            mask = token_mask(offsets, text.spans)
            results.append(Encoded(ids, mask, num_missed(text.text, text.spans, offsets, mask)))
        return results

    def _texts(self, dialogue: Dialogue) -> tuple[list[_Text], int]:
        """Texts to learn from, each with at least one answer, and how many answers are in none."""
        if self._marked and not any("finish_reason" in message for message in dialogue.messages):
            text, marks = self._template.render_marked(dialogue.messages, dialogue.options)
            if _plausible(text, marks, dialogue.messages):
                # Some templates mark the text alone; the target says what ends it, too.
                marks = [(start, end + len(self._end) * text.startswith(self._end, end)) for start, end in marks]
                marked = _Text(text, marks)
                if marks and not self._end and not text[marks[-1][1] :].strip():
                    self._end_by_eos(marked)
                return [marked], 0
        return self._texts_by_prefix(dialogue)

    def _texts_by_prefix(self, dialogue: Dialogue) -> tuple[list[_Text], int]:
        messages, last = dialogue.messages, len(dialogue.messages) - 1
        text = self._template.render(messages, dialogue.options)
        spans = self._spans(dialogue, text, self._reach(text, len(messages)))
        whole = _Text(text, [span for span in spans.values() if span])
        if spans.get(last) and _is_cut(messages[last]):
            whole.text = text[: whole.spans[-1][1]]
        elif spans.get(last) and not self._end:
            self._end_by_eos(whole)
        own = [self._own_text(dialogue, k) for k, span in spans.items() if not span]
        return [*([whole] if whole.spans or not own else []), *(one for one in own if one)], own.count(None)

    def _end_by_eos(self, text: _Text) -> None:
        """Let the last answer end as the target ends it, where the template does not say."""
        start, end = text.spans[-1]
        text.text = text.text[:end] + self._eos
        text.spans[-1] = start, len(text.text)

    def _reach(self, text: str, num_messages: int) -> int:
        """Characters of which an example can consist."""
        if num_messages <= MANY:
            return len(text)
        offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        return len(text) if len(offsets) <= self._max_length else int(offsets[self._max_length - 1][1])

    def _spans(self, dialogue: Dialogue, full: str, reach: int) -> dict[int, tuple[int, int] | None]:
        """By message, characters [start, end) of every answer within reach; None where it is not as the target writes it."""
        spans: dict[int, tuple[int, int] | None] = {}
        cursor = 0  # behind everything that was found so far
        for k, message in enumerate(dialogue.messages):
            if cursor >= reach:
                break
            content = message["content"]
            if message["role"] != "assistant":
                at = full.find(content.strip(), cursor)
                cursor = at + len(content.strip()) if at >= 0 else cursor
                continue
            spans[k] = span = self._span(dialogue, k, full, cursor)
            cursor = span[1] if span else cursor
        return spans

    def _span(self, dialogue: Dialogue, k: int, full: str, cursor: int) -> tuple[int, int] | None:
        message, content = dialogue.messages[k], dialogue.messages[k]["content"]
        prompt = self._render_part(dialogue, k, add_generation_prompt=True)
        follows = bool(prompt) and full.startswith(prompt)
        if "finish_reason" in message:  # word for word what the target wrote behind this prompt
            if not follows or not full.startswith(content, len(prompt)):
                return None
            end = len(prompt) + len(content)
            if _is_cut(message):
                return len(prompt), end
            return (len(prompt), end + len(self._end)) if full.startswith(self._end, end) else None
        if not follows and _goes_on(prompt, content):
            return None
        until = full if k + 1 == len(dialogue.messages) else self._render_part(dialogue, k + 1)
        start = len(prompt) if follows else full.find(content, cursor)
        if start < 0:
            return None
        if full.startswith(until) and len(until) > start:
            end = len(until)
        elif full.startswith(content, start):
            end = start + len(content)
            # The end of the turn follows the answer in the shorter rendering; take it along if it follows here, too.
            turn_end = until[until.rfind(content) + len(content) :] if content in until else ""
            end += len(turn_end) if full.startswith(turn_end, end) else 0
        else:  # the template changed the answer itself
            return None
        return start, start + len(full[start:end].rstrip())  # line breaks behind the end of the turn are the template's

    def _own_text(self, dialogue: Dialogue, k: int) -> _Text | None:
        """One answer as the target writes it; None if the template does not render what comes before it."""
        message = dialogue.messages[k]
        prompt = self._render_part(dialogue, k, add_generation_prompt=True)
        if not prompt:
            return None
        content = message["content"] if "finish_reason" in message else _unopened(prompt, message["content"])
        text = prompt + content + ("" if _is_cut(message) else self._end or self._eos)
        return _Text(text, [(len(prompt), len(text))])

    def _render_part(self, dialogue: Dialogue, k: int, add_generation_prompt: bool = False) -> str:
        """The first `k` messages; empty if the template cannot render them."""
        try:
            return self._template.render(dialogue.messages[:k], dialogue.options, add_generation_prompt)
        except Exception:  # as above; the whole dialogue rendered, so the answer's text can still be found
            return ""

    @property
    def _eos(self) -> str:
        return self._tokenizer.eos_token or ""

    def _end_of_turn(self) -> str:
        """What the template puts behind an answer, but for white space; empty if nothing."""
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
        try:
            text = self._template.render(messages, {})
        except Exception:  # as above
            return self._eos
        return text.rpartition(_ANSWER)[2].strip() if _ANSWER in text else self._eos


def token_mask(
    offsets: list[tuple[int, int]],  # characters of every token; empty where the tokenizer trims white space
    spans: list[tuple[int, int]],
) -> torch.Tensor:  # [length] bool
    """Tokens that lie in a span. One that reaches into it from outside is no answer's: the prompt ends inside it."""
    first, last = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    before = np.concatenate([[0], last[:-1]])
    mask = np.zeros(len(first), dtype=bool)
    for start, end in spans:
        # `last > start` keeps out white space before the span that was trimmed to an empty token at its start, and white space
        # at its end, trimmed likewise, begins where the token before it ends.
        mask |= (first >= start) & (last > start) & ((first < end) | ((first == last) & (first == end) & (before < end)))
    return torch.from_numpy(mask)


def num_missed(
    text: str,
    spans: list[tuple[int, int]],
    offsets: list[tuple[int, int]],
    mask: torch.Tensor,  # [len(offsets)] bool
) -> int:
    """Characters in spans, white space apart, that no masked token holds."""
    covered = np.zeros(len(text) + 1, dtype=np.int64)
    first, last = np.array(offsets, dtype=np.int64).reshape(-1, 2)[mask.numpy()].T
    np.add.at(covered, first, 1)
    np.add.at(covered, last, -1)
    bare = covered.cumsum() == 0
    return sum(not text[start + int(i)].isspace() for start, end in spans for i in bare[start:end].nonzero()[0])


def _is_cut(message: Message) -> bool:
    return message.get("finish_reason") == "length"


def _goes_on(prompt: str, content: str) -> bool:
    """Whether an answer closes, or repeats, what its prompt has opened."""
    opening = _OPENING.search(prompt)
    if opening is None:
        return False
    left, name, right = opening.groups()
    return f"{left}/{name}{right}" in content or content.lstrip().startswith(left + name + right)


def _unopened(prompt: str, content: str) -> str:
    """An answer without the opening that stands at the end of its prompt already."""
    opening = _OPENING.search(prompt)
    tag = opening[0].strip() if opening else ""
    if not opening or not content.lstrip().startswith(tag):
        return content
    rest = content.lstrip().removeprefix(tag)
    return rest.lstrip("\n") if opening[0] != tag else rest  # the prompt has the line break, too


def _plausible(text: str, marks: list[tuple[int, int]], messages: list[Message]) -> bool:
    """Whether marks hold an answer, if the text does: inside of macros they are counted from the wrong place."""
    places, cursor = [], 0
    for message in messages:
        at = text.find(message["content"].strip(), cursor)
        if at >= 0:
            cursor = at + len(message["content"].strip())
            places += [(at, cursor)] if message["role"] == "assistant" else []
    return not (places and marks) or any(start <= at and end <= until for at, end in places for start, until in marks)
