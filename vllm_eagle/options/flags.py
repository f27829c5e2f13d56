"""Command-line flags of draft trees, made from the fields of TreeConfig.

They all write into `additional_config["vllm_eagle"]`, the one place where tree options live, so that vLLM carries them to its
workers as it carries its own options. vLLM's `--additional-config` would replace what flags have written; here it is merged.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from vllm_eagle.algorithm.config import CONFIG_KEY, Mode, TreeConfig

TITLE = "EAGLE draft trees"
# Options that vLLM's speculative_config takes in the end, by its names.
HEAD_OPTIONS = {"model": "model", "num_draft_tokens": "num_speculative_tokens"}
_HEAD_FLAGS = {"model": "--speculative-model", "num_draft_tokens": "--num-speculative-tokens"}


def flag(option: str) -> str:
    """The flag of an option."""
    return _HEAD_FLAGS.get(option) or f"--speculative-tree-{option.replace('_', '-')}"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags, in a group of their own, to a parser that has vLLM's engine arguments."""
    theirs: Any = next(action for action in parser._actions if action.dest == "additional_config")
    group = parser.add_argument_group(
        TITLE,
        "Speculative decoding with draft trees (vllm_eagle). --speculative-model switches it on.",
        conflict_handler="resolve",
    )
    _keep_abbreviations(parser)
    group.add_argument(
        flag("model"),
        action=_Option,
        option="model",
        metavar="HEAD",
        help="EAGLE head for the model: draft trees with it. For vLLM's own speculation use --spec-model or --speculative-config.",
    )
    for name, (annotated, text) in annotations().items():
        default = TreeConfig.__dataclass_fields__[name].default
        group.add_argument(
            flag(name),
            action=_Switch if annotated is bool else _Option,
            option=name,
            help=text if default in (None, dataclasses.MISSING) else f"{text} (default: {json.dumps(default)})",
            **_reading(annotated),
        )
    # Taken over from vLLM's group, with the same help.
    group.add_argument(
        *theirs.option_strings,
        action=_Additional,
        dest=theirs.dest,
        type=theirs.type,
        default=theirs.default,
        help=theirs.help,
    )


def annotations() -> dict[str, tuple[Any, str]]:
    """Type and text of each tree option."""
    hints = get_type_hints(TreeConfig, include_extras=True)
    return {field.name: get_args(hints[field.name])[:2] for field in dataclasses.fields(TreeConfig)}


def _reading(annotated: Any) -> dict[str, Any]:
    """How a value of this type is read from the command line."""
    if annotated is bool:
        return {}
    if annotated is Mode:
        return {"choices": get_args(Mode)}
    if annotated == int | None:
        annotated = int
    if annotated in (int, float):
        return {"type": annotated, "metavar": annotated.__name__.upper()}
    return {"type": json.loads, "metavar": "JSON"}


def _keep_abbreviations(parser: argparse.ArgumentParser) -> None:
    """Abbreviations that stood for --speculative-config alone still do, although more flags begin like it now."""
    config = parser._option_string_actions["--speculative-config"]
    for end in range(len("--specu"), len("--speculative-") + 1):
        parser._option_string_actions.setdefault("--speculative-config"[:end], config)


def _merge(parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> None:
    """Put together what --additional-config and the flags have said so far."""
    found = vars(namespace)
    flags, given = found.get("eagle_flags", {}), found.get("eagle_additional_config") or {}
    options = given.get(CONFIG_KEY, {})
    if not isinstance(options, dict):
        return  # refused when the configuration is made, as without flags
    for name, value in flags.items():
        if name in options and options[name] != value:
            parser.error(
                f"{flag(name)} {json.dumps(value)} contradicts {CONFIG_KEY}.{name} = {json.dumps(options[name])} in "
                "--additional-config; remove one of them"
            )
    found["additional_config"] = given | {CONFIG_KEY: options | flags}


class _Option(argparse.Action):
    """A flag that sets one tree option."""

    def __init__(self, option_strings: Sequence[str], dest: str, option: str, **kwargs: Any):
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, **kwargs)
        self.option = option

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        found = vars(namespace)
        found["eagle_flags"] = found.get("eagle_flags", {}) | {self.option: values}
        found.setdefault("eagle_additional_config", found.get("additional_config"))
        _merge(parser, namespace)


class _Switch(_Option):
    """The same for a boolean: --x or --no-x."""

    def __init__(self, option_strings: Sequence[str], dest: str, option: str, **kwargs: Any):
        both = [*option_strings, *(f"--no-{name.removeprefix('--')}" for name in option_strings)]
        super().__init__(both, dest, option, nargs=0, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, namespace, not str(option_string).startswith("--no-"), option_string)


class _Additional(argparse.Action):
    """vLLM's --additional-config, which does not forget the flags."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        found = vars(namespace)
        found["additional_config"] = values
        if "eagle_flags" in found:
            found["eagle_additional_config"] = values
            _merge(parser, namespace)
