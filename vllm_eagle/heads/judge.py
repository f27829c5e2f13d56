"""One judgement of a head, from its config.json and tensors: fits, fits after convert, or does not.

`inspect` prints it, `convert`, `eval` and `train --init` go by it, and so do the offline LLM and `vllm serve`, before anything is
loaded. So what one of them refuses all refuse, in the same words.
"""

from dataclasses import dataclass
from typing import Literal

from vllm_eagle.heads import draft_vocab
from vllm_eagle.heads.check import lm_head_problems, misfits, oddities, problems
from vllm_eagle.heads.formats import Head
from vllm_eagle.heads.reading import differences
from vllm_eagle.heads.target import Target

Verdict = Literal["fits", "fits after convert", "does not fit"]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is to be said about a head, a sentence each, without its name."""

    wrong: tuple[str, ...]  # with the head itself
    misfits: tuple[str, ...]  # with head and target
    differences: tuple[str, ...]  # what vLLM would misread, and convert mends
    odd: tuple[str, ...]  # what a user should know

    @property
    def verdict(self) -> Verdict:
        """Whether the head can be served; a head that fits after convert is converted when it is served."""
        if self.wrong or self.misfits:
            return "does not fit"
        return "fits after convert" if self.differences else "fits"

    def refusal(self) -> str | None:
        """The first thing that is wrong, and how many more there are; None if nothing is."""
        found = [*self.wrong, *self.misfits]
        if not found:
            return None
        more = f" (and {len(found) - 1} more, which vllm-eagle inspect lists)" if len(found) > 1 else ""
        return found[0] + more


def judge(head: Head, target: Target | None) -> Judgement:
    """Judge a head, for a target if there is one."""
    wrong = problems(head) + _draft_vocab_problems(head)
    return Judgement(
        wrong=tuple(wrong + lm_head_problems(head, target)),
        misfits=() if target is None else tuple(misfits(head, target)),
        differences=() if wrong else tuple(differences(head)),
        odd=tuple(oddities(head, target)),
    )


def _draft_vocab_problems(head: Head) -> list[str]:
    """Whether the file beside an EAGLE-1 head, if there is one, names tokens of its vocabulary."""
    try:
        if head.kind == "EAGLE-1":
            draft_vocab.read(head.path, head.vocab_size)
    except ValueError as error:
        return [str(error).removeprefix(f"{head.path}/")]
    return []
