"""What goes between worker and scheduler about drafts: how many, how deep. The worker's first rank decides, and all ranks do alike.

It goes with a step's output to the scheduler, and with what is scheduled next to the workers: one or two steps after it was said.
"""

from dataclasses import dataclass
from typing import Any

_NAME = "vllm_eagle_drafts"  # an attribute of vLLM's ModelRunnerOutput and SchedulerOutput, which go to other processes whole


@dataclass(frozen=True, slots=True)
class Drafts:
    """Of the steps to come."""

    most: int  # drafts that a request may have scheduled; 0: nothing is drafted
    depth: int  # levels
    widths: tuple[int, ...] | None = None  # most nodes to expand per request at depth 1, 2, ...
    per_request: float | None = None  # drafts that a request has on the average, split by score; None: all that are scheduled


def say(output: Any, drafts: Drafts) -> None:
    """Put it into vLLM's object."""
    output.__dict__[_NAME] = drafts


def said(output: Any) -> Drafts | None:
    """What was put there; None if nothing was."""
    found: Drafts | None = getattr(output, _NAME, None)
    return found
