"""What is measured on some texts: the accuracy of drafts, and what became of trees. Kinds of prompts are measured one by one and
add up to the whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.evaluate.accuracy import ALPHA_DEPTH, Accuracy, measure_accuracy
from vllm_eagle.evaluate.simulate import Replay, replay
from vllm_eagle.evaluate.texts import Read, Text, read_texts
from vllm_eagle.train.features.target import FrozenTarget
from vllm_eagle.train.head.models import Head, aux_layers


@dataclass(slots=True)
class Measured:
    """Counts of some texts."""

    num_prompts: int
    num_tokens: int  # of the answers
    accuracy: Accuracy
    replays: dict[str, Replay]  # by tree

    def merge(self, other: "Measured") -> None:
        """Add the counts of other texts."""
        self.num_prompts += other.num_prompts
        self.num_tokens += other.num_tokens
        self.accuracy.merge(other.accuracy)
        for name, part in other.replays.items():
            self.replays[name].merge(part)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; without trees no "trees"."""
        result: dict[str, Any] = {"prompts": self.num_prompts, "tokens": self.num_tokens} | self.accuracy.as_dict()
        if self.replays:
            result["trees"] = {name: found.as_dict() for name, found in self.replays.items()}
        return result


def nothing(head: Head, trees: Mapping[str, TreeConfig]) -> Measured:
    """Where counting starts."""
    return Measured(0, 0, Accuracy(head.max_steps or ALPHA_DEPTH), {name: Replay() for name in trees})


def measure(
    target: FrozenTarget,
    head: Head,
    texts: Sequence[Text],
    trees: Mapping[str, TreeConfig],
    temperature: float,
    batch: int,  # texts at a time
    on_batch: Callable[[], object],  # called as often as there are batches, for each tree
) -> Measured:
    """Measure chains and the given trees."""
    batches = list(read_texts(target, texts, aux_layers(head.config), batch))
    window = max((config.draft_window or 0 for config in trees.values()), default=0)  # one for all: the head's, or the option
    accuracy = measure_accuracy(target, head, batches, head.max_steps or ALPHA_DEPTH, temperature, window=window)
    replays = {name: replay(head, _counted(batches, on_batch), config, temperature) for name, config in trees.items()}
    return Measured(len(texts), sum(text.num_answer for text in texts), accuracy, replays)


def _counted(batches: list[Read], on_batch: Callable[[], object]) -> Iterator[Read]:
    for batch in batches:
        yield batch
        on_batch()
