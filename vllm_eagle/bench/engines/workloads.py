"""Named workloads of `vllm-eagle bench`: how much stands before a question, and how long answers are.

questions      the prompts as they are
long_answers   the same, answered at length: prompts take no part in the time
long_contexts  each behind other prompts' texts, 2,000 tokens in all: attention, and the head's, reach far
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_eagle.train.data.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked."""

    max_tokens: int  # of an answer
    context_tokens: int | None = None  # of a prompt, filled up with other prompts' texts; None: as it is


WORKLOADS = {"questions": Workload(96), "long_answers": Workload(256), "long_contexts": Workload(64, 2000)}


def in_context(prompts: Sequence["Prompt"], context_tokens: int, encode: Callable[["Prompt"], list[int]]) -> list["Prompt"]:
    """Each prompt behind the texts of those that follow it, as many as fit.

    Args:
        prompts: at least one.
        context_tokens: most tokens of a prompt, with what its template adds.
        encode: token ids of a prompt.

    Raises:
        ValueError: all texts together are shorter than three quarters of that.
    """
    texts = [_text(prompt) for prompt in prompts]
    found = []
    for i, prompt in enumerate(prompts):
        others = texts[i + 1 :] + texts[:i]

        def behind(number: int, prompt: "Prompt" = prompt, others: list[str] = others) -> "Prompt":
            return _behind(prompt, others[:number])

        number = bisect_right(range(len(others) + 1), context_tokens, key=lambda n: len(encode(behind(n)))) - 1
        found.append(behind(max(number, 0)))
        if number == len(others) and (reached := len(encode(found[-1]))) < 0.75 * context_tokens:
            raise ValueError(
                f"contexts of {context_tokens} tokens are made of all prompts' texts, and these have {reached}; "
                "give --prompts with more of them"
            )
    return found


def _text(prompt: "Prompt") -> str:
    return prompt.asked if isinstance(prompt.asked, str) else str(prompt.asked[-1]["content"])


def _behind(prompt: "Prompt", texts: Sequence[str]) -> "Prompt":
    """The texts stand at the beginning of the last turn."""
    whole = "\n\n".join([*texts, _text(prompt)])
    if isinstance(prompt.asked, str):
        return replace(prompt, asked=whole)
    return replace(prompt, asked=[*prompt.asked[:-1], prompt.asked[-1] | {"content": whole}])
