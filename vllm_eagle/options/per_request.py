"""What one request may ask for: no speculation, or a smaller tree. Passed through vLLM's extra arguments.

`SamplingParams(extra_args={"eagle_num_draft_tokens": 4})`, or over HTTP `"vllm_xargs": {"eagle_num_draft_tokens": 4}`. None of it
changes what is emitted, only how fast.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_eagle.algorithm.config import MAX_DRAFT_TOKENS

PREFIX = "eagle_"


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """Upper limits for the trees of one request; the engine's own options hold, too."""

    num_draft_tokens: int = MAX_DRAFT_TOKENS  # most nodes besides the root; 0 switches speculation off
    max_depth: int = MAX_DRAFT_TOKENS  # most levels
    topk: int = MAX_DRAFT_TOKENS  # most children per node; 1 drafts a chain

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None, num_draft_tokens: int = MAX_DRAFT_TOKENS) -> "RequestOptions":
        """Read the arguments that start with `eagle_`; `num_draft_tokens` is the engine's own limit.

        Raises:
            ValueError: one of them is unknown or impossible; the message names it and what is allowed.
        """
        values: dict[str, int] = {}
        for name, value in (extra_args or {}).items():
            if not name.startswith(PREFIX):
                continue
            field = name.removeprefix(PREFIX)
            if field not in cls.__slots__:
                known = ", ".join(PREFIX + x for x in cls.__slots__)
                raise ValueError(f"unknown extra argument {name!r}; known ones: {known}")
            lowest = 0 if field == "num_draft_tokens" else 1
            if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= num_draft_tokens:
                raise ValueError(
                    f"{name}={value!r} is not possible here; set {name} to an integer from {lowest} to {num_draft_tokens}"
                )
            values[field] = value
        return cls(**values)
