"""Where the assistant's answers stand in a dialogue, as rendered by the chat template and as tokens.

A template that marks answers with `{% generation %}` says so itself. With any other the dialogue is rendered up to each answer:
what a longer rendering adds is the answer and its end of turn. Templates that rewrite earlier turns (for example drop their
reasoning) break that rule for all answers but the last; there the text of the answer is looked for.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_eagle.train.data.rows import Message

_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Messages that end with an answer."""

    messages: list[Message]
    is_cut: bool = False  # the last answer stops in the middle: no end of turn follows it


@dataclass(frozen=True, slots=True)
class Encoded:
    """A dialogue as tokens."""

    token_ids: list[int]
    loss_mask: torch.Tensor  # [length] bool, the tokens of answers
    num_missing: int = 0  # answers that the template changed beyond recognition


@dataclass(frozen=True, slots=True)
class _Rendered:
    text: str
    spans: list[tuple[int, int]]
    num_missing: int


class Dialogues:
    """Encodes dialogues and marks the tokens of answers. Needs a fast tokenizer with a chat template."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._marked = _GENERATION.search(tokenizer.get_chat_template()) is not None

    def encode(self, dialogues: list[Dialogue]) -> list[Encoded | str]:
        """Per dialogue its tokens, or what the template complained of."""
        results: list[Encoded | str] = [""] * len(dialogues)
        marked = [i for i, dialogue in enumerate(dialogues) if self._marked and not dialogue.is_cut]
        others = [i for i, dialogue in enumerate(dialogues) if not self._marked or dialogue.is_cut]
        for indices, encode in ((marked, self._encode_marked), (others, self._encode_by_prefix)):
            if indices:
                for i, result in zip(indices, encode([dialogues[i] for i in indices]), strict=True):
                    results[i] = result
        return results

    def _encode_marked(self, dialogues: list[Dialogue]) -> list[Encoded | str]:
        conversations = [dialogue.messages for dialogue in dialogues]
        options = {"return_assistant_tokens_mask": True, "return_dict": True, "tokenizer_kwargs": {"verbose": False}}
        try:
            out = self._tokenizer.apply_chat_template(conversations, **options)
        except Exception as error:  # a template is a program of the model's author and may raise anything
            if len(dialogues) == 1:
                return [_one_line(error)]
            return [self._encode_marked([dialogue])[0] for dialogue in dialogues]
        masks = [torch.tensor(mask, dtype=torch.bool) for mask in out["assistant_masks"]]
        return [Encoded(ids, mask) for ids, mask in zip(out["input_ids"], masks, strict=True)]

    def _encode_by_prefix(self, dialogues: list[Dialogue]) -> list[Encoded | str]:
        entries = [self._render_with_spans(dialogue) for dialogue in dialogues]
        texts = [entry.text for entry in entries if isinstance(entry, _Rendered)]
        # The tokenizer refuses an empty batch.
        out = self._tokenizer(texts or [""], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens = zip(out["input_ids"], out["offset_mapping"], strict=True)
        results: list[Encoded | str] = []
        for entry in entries:
            if isinstance(entry, str):
                results.append(entry)
            else:
                ids, offsets = next(tokens)
                results.append(Encoded(ids, token_mask(offsets, entry.spans), entry.num_missing))
        return results

    def _render_with_spans(self, dialogue: Dialogue) -> _Rendered | str:
        messages = dialogue.messages
        try:
            text = self._render(messages)
            spans = self._spans(messages, text)
            if dialogue.is_cut or spans[-1] is None:
                # The text that the target saw while it wrote the last answer, and as far as it got.
                text = self._render(messages[:-1], add_generation_prompt=True)
                start = len(text)
                text += messages[-1]["content"]
                spans = [*self._spans(messages[:-1], text[:start]), (start, len(text))]
        except Exception as error:  # as above
            return _one_line(error)
        found = [span for span in spans if span]
        return _Rendered(text, found, len(spans) - len(found))

    def _render(self, messages: list[Message], **options: Any) -> str:
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return text

    def _spans(self, messages: list[Message], full: str) -> list[tuple[int, int] | None]:
        """Characters [start, end) of every answer in the rendered dialogue, None where it cannot be found."""
        spans: list[tuple[int, int] | None] = []
        cursor = 0  # behind everything that was found so far
        for k, message in enumerate(messages):
            content = message["content"]
            if message["role"] != "assistant":
                at = full.find(content.strip(), cursor)
                cursor = at + len(content.strip()) if at >= 0 else cursor
                continue
            span = self._span(messages, k, full, cursor)
            spans.append(span)
            cursor = span[1] if span else cursor
        return spans

    def _span(self, messages: list[Message], k: int, full: str, cursor: int) -> tuple[int, int] | None:
        content = messages[k]["content"]
        prefix = self._render_part(messages[:k], add_generation_prompt=True)
        until = full if k + 1 == len(messages) else self._render_part(messages[: k + 1])
        start = len(prefix) if prefix and full.startswith(prefix) else full.find(content, cursor)
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

    def _render_part(self, messages: list[Message], **options: Any) -> str:
        """Empty if the template cannot render a part of the dialogue."""
        try:
            return self._render(messages, **options)
        except Exception:  # as above; the whole dialogue rendered, so the answer's text can still be found
            return ""


def token_mask(
    offsets: list[tuple[int, int]],  # characters of every token; empty where the tokenizer trims white space
    spans: list[tuple[int, int]],
) -> torch.Tensor:  # [length] bool
    """Tokens that lie in a span. One that reaches into it from outside is no answer's: the prompt ends inside it."""
    first, last = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    mask = np.zeros(len(first), dtype=bool)
    for start, end in spans:
        # `last > start` keeps out white space before the span that was trimmed to an empty token at its start.
        mask |= (first >= start) & (last > start) & (first < end)
    return torch.from_numpy(mask)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
