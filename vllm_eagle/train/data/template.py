"""The target's chat template and what it is given beside the messages: tools, and arguments such as enable_thinking.

All dialogues are rendered here, so that a head learns, and is measured on, what the target sees.
"""

import argparse
import json
from typing import Any

from vllm_eagle.train.data.report import OUTSIDE
from vllm_eagle.train.data.rows import ARGUMENTS, Message, RowError, checked_arguments

FLAG = "--chat-template-kwargs"


class ChatTemplate:
    """A template with the arguments of a run.

    Args:
        tokenizer: whose template it is.
        name: of the target, for messages.
        arguments: the template's variables; those of a row come before them.

    Raises:
        ValueError: there is no template, or it does not use an argument.
    """

    def __init__(self, tokenizer: Any, name: str, arguments: dict[str, Any] | None = None):
        check_template(tokenizer, name)
        self.tokenizer, self.arguments = tokenizer, arguments or {}
        unused = [key for key in self.arguments if not self.uses(key)]
        if unused:
            raise ValueError(f"{FLAG}: the chat template of {name} does not use {', '.join(unused)}; remove it")

    def uses(self, name: str) -> bool:
        """Whether the template mentions a variable."""
        return name in str(self.tokenizer.chat_template)

    def render(self, messages: list[Message], options: dict[str, Any], add_generation_prompt: bool = False) -> str:
        """A dialogue as text; `options` are the row's tools and arguments.

        Raises:
            Exception: whatever the template raises: it is a program of the model's author.
        """
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **self.arguments | options
        )
        return text

    def rendered(self, messages: list[Message], options: dict[str, Any], add_generation_prompt: bool = False) -> str:
        """As `render`.

        Raises:
            RowError: the template complained.
        """
        try:
            return self.render(messages, options, add_generation_prompt)
        except Exception as error:  # a template may raise anything
            raise RowError("template error", " ".join(f"{error}".split())[:200]) from None

    def render_marked(self, messages: list[Message], options: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """A dialogue as text, and characters [start, end) of its `{% generation %}` blocks.

        Raises:
            Exception: as above.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        options = self.arguments | options
        [text], [marks] = render_jinja_template(
            conversations=[messages],
            chat_template=self.tokenizer.get_chat_template(tools=options.get("tools")),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map | options,
        )
        return text, marks

    def encode(self, text: str) -> list[int]:
        """Tokens of a rendered text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def row_keys(self, options: dict[str, Any]) -> dict[str, Any]:
        """Tools and arguments as a row says them, so that whoever reads it renders what was rendered here."""
        given = self.arguments | options
        tools = given.pop("tools", None)
        return ({"tools": tools} if tools else {}) | ({ARGUMENTS: given} if given else {})


def check_ids(ids: list[int], tokenizer: Any, vocab_size: int | None) -> None:
    """Refuse tokens for which the target has no embedding: a tokenizer may hold more than the model was made for.

    Raises:
        RowError: there is one.
    """
    if vocab_size is not None and ids and (highest := max(ids)) >= vocab_size:
        raise RowError(OUTSIDE, f"{tokenizer.convert_ids_to_tokens(highest)} is number {highest} of {vocab_size}")


def check_template(tokenizer: Any, name: str) -> None:
    """Refuse a target, by its name, whose tokenizer cannot render dialogues.

    Raises:
        ValueError: it has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"{name}: the tokenizer has no chat template; put a chat_template.jinja into its folder")


def add_template_argument(parser: argparse.ArgumentParser) -> None:
    """The option of all subcommands that render dialogues."""
    parser.add_argument(FLAG, metavar="JSON", help="for the target's chat template, e.g. '{\"enable_thinking\": false}'")


def parse_arguments(text: str | None) -> dict[str, Any] | None:
    """The value of --chat-template-kwargs.

    Raises:
        ValueError: it is no JSON object, or holds what is not for the template to be told.
    """
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{FLAG}: no JSON ({error}): {text[:80]!r}; it is to look like '{{\"enable_thinking\": false}}'") from None
    try:
        return checked_arguments(found)
    except RowError as error:
        raise ValueError(f"{FLAG}: {error.reason} ({error.detail})") from None
