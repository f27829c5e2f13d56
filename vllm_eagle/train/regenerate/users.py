"""Where a user's turn begins and ends in a chat template: what a model is given to write that turn itself.

Magpie (arXiv 2406.08464): a chat model that reads its template up to where the user begins goes on with what a user would say.
"""

from contextlib import suppress
from dataclasses import dataclass

from vllm_eagle.train.data.rows import Message
from vllm_eagle.train.data.template import ChatTemplate

_FIRST, _ANSWER, _USER = "vllmeaglefirst", "vllmeagleanswer", "vllmeagleuser"  # stand for turns; no template says them itself


@dataclass(frozen=True, slots=True)
class Ends:
    """What ends a user's turn, beside the model's own end-of-text tokens, and what no turn may contain."""

    stops: tuple[str, ...]  # at most one: what the template puts behind a user's turn
    markers: tuple[str, ...]  # special tokens, and the names that the template gives to who speaks


class Users:
    """Prompts that end where a user begins.

    Args:
        template: the target's.
        name: of the target, for messages.
        turns: most user turns of a dialogue.

    Raises:
        ValueError: the chat template cannot be cut where a user begins.
    """

    def __init__(self, template: ChatTemplate, name: str, turns: int):
        self._template, tokenizer = template, template.tokenizer
        try:
            before = self.before([])
            after = template.render([_said("user", _USER)], {}, add_generation_prompt=True).partition(_USER)[2]
            between = ""
            with suppress(*(() if turns > 1 else (Exception,))):
                between = self.before([_said("user", _FIRST), _said("assistant", _ANSWER)]).rpartition(_ANSWER)[2]
        except Exception as error:  # a template is a program of the model's author and may raise anything
            reason = " ".join(f"{error}".split())[:200]
            raise ValueError(f"{name}: its chat template cannot be cut where a user begins ({reason}); {_WAY_OUT}") from None
        if not before.removeprefix(tokenizer.bos_token or "").strip():
            raise ValueError(
                f"{name}: its chat template puts nothing before a user's turn, so nothing asks the model for one; {_WAY_OUT}"
            )
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        self.ends = Ends(_stops(after, special), tuple(sorted(special | _names(between, special) | _names(after, special))))

    def before(self, messages: list[Message]) -> str:
        """The template up to where the user's next turn begins.

        Raises:
            ValueError: the template does not show that turn once, word for word.
            Exception: whatever the template raises.
        """
        text = self._template.render([*messages, _said("user", _USER)], {})
        if text.count(_USER) != 1:
            raise ValueError("it does not show each user's turn once")
        # The space belongs to the first word, for a tokenizer.
        return text.rpartition(_USER)[0].rstrip(" ")


_WAY_OUT = "write questions into a file and give --data"


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _stops(after: str, special: set[str]) -> tuple[str, ...]:
    """The first thing behind a user's turn: a special token, or a line."""
    text = after.lstrip()
    if not text:
        return ()
    for token in sorted(special, key=len, reverse=True):
        if text.startswith(token):
            return (token,)
    line_break = "\n" if "\n" in after[: len(after) - len(text)] else ""  # "\nA:", so that a text may say "USA:"
    return (line_break + text.splitlines()[0].rstrip(),)


def _names(text: str, special: set[str]) -> set[str]:
    """Lines as "USER:" or "[INST]"; plain words are none, they may stand in any text."""
    for token in sorted(special, key=len, reverse=True):
        text = text.replace(token, "\n")
    return {line.strip() for line in text.splitlines() if len(line.strip()) > 1 and not line.strip().isalnum()}
