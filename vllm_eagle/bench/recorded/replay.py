"""A pair of a given shape without trained weights, whose head is right as often as a recorded one was.

What a pass costs depends on shapes, what a draft wins on text and training. On hardware where no trained model lies, the first can
be measured with random weights if the second is replayed: at every position the target's token and the head's probabilities are
drawn from a recording, by the position alone. So plain decoding, chains and trees see one text, and nothing else of the engine
changes. Replayed are how sure the head was and how often it was right then, not how both follow each other in a text.

The recording is that of `vllm-eagle simulate`; the model classes are in replay_models.py.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_eagle.bench.recorded.simulate import RECORDED
from vllm_eagle.heads.formats import REPLAYED_ARCHITECTURES
from vllm_eagle.pair import TARGET

NUM_CLASSES = NUM_RANKS = 8
PROFILE = "vllm_eagle_replay"  # in config.json of target and head
SHAPES: dict[str, dict[str, Any]] = {
    # As Llama 3.1 8B.
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 32768,
    },
    "tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 4096, "max_position_embeddings": 4096,
    },
}  # fmt: skip
_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Profile:
    """Classes of positions, as many of each, from unsure to sure."""

    probabilities: list[list[float]]  # [NUM_CLASSES][NUM_RANKS] the head's, of its best tokens
    accepted: list[list[float]]  # [NUM_CLASSES][NUM_RANKS] how often that token was the target's

    def expected_tau(self, num_draft_tokens: int) -> float:
        """Tokens per target pass of a chain of so many drafts, if no answer ended."""
        first = float(np.mean([ranks[0] for ranks in self.accepted]))
        return sum(first**depth for depth in range(num_draft_tokens + 1))


def profile(path: Path = RECORDED) -> Profile:
    """What a recording of `vllm_eagle.bench.recorded.record` says of positions whose children were all drafted or none was right.

    Tokens that the trees did not draft count as improbable and wrong: a little less than the head could have had.
    """
    found = [position for tree in json.loads(path.read_text())["trees"] for position in _positions(**tree)]
    found.sort(key=lambda position: -position[0][0])
    probabilities, accepted = [], []
    for part in np.array_split(np.arange(len(found)), NUM_CLASSES):
        probabilities.append(np.mean([found[i][0] for i in part], axis=0).round(5).tolist())
        accepted.append(np.mean([np.arange(NUM_RANKS) == found[i][1] for i in part], axis=0).round(5).tolist())
    return Profile(probabilities[::-1], accepted[::-1])


def _positions(parents: Sequence[int], scores: Sequence[float], path: Sequence[int]) -> list[tuple[np.ndarray, int]]:
    """Per node that was reached and had children: probabilities [NUM_RANKS] and the rank of the target's token, or NUM_RANKS."""
    found = []
    for node, after in zip([0, *path], [*path, -1], strict=True):
        children = [child for child in range(1, len(parents)) if parents[child] == node]
        if not children:
            continue  # the tree ended here: nobody knows
        logs = np.array([scores[child] - scores[node] for child in children])
        order = np.argsort(-logs, kind="stable")[:NUM_RANKS]
        probabilities = np.zeros(NUM_RANKS)
        probabilities[: len(order)] = np.exp(logs[order])
        ranked = [children[i] for i in order]
        found.append((probabilities, ranked.index(after) if after in ranked else NUM_RANKS))
    return found


def write_pair(folder: Path, shape: str) -> tuple[Path, Path]:
    """Write target and head, for `load_format="dummy"`: settings and tokenizer, no weights worth the name.

    Raises:
        ValueError: the shape is unknown.
    """
    import torch
    from safetensors.torch import save_file

    if shape not in SHAPES:
        raise ValueError(f"--replay {shape}: unknown; known: {', '.join(SHAPES)}")
    replayed = profile()
    settings = json.loads((TARGET / "config.json").read_text()) | SHAPES[shape]
    settings |= {PROFILE: {"probabilities": replayed.probabilities, "accepted": replayed.accepted}}
    of_target, of_head = REPLAYED_ARCHITECTURES
    target, head = folder / f"target-{shape}", folder / f"head-{shape}"
    for path, changes in (
        (target, {"architectures": [of_target]}),
        (head, {"architectures": [of_head], "num_hidden_layers": 1}),
    ):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(settings | changes))
    for name in _FILES:
        shutil.copyfile(TARGET / name, target / name)
    # Dummy weights are made from the classes; that a head has weights, and which, is looked at before.
    save_file({"fc.weight": torch.zeros(1), "layers.0.mlp.up_proj.weight": torch.zeros(1)}, head / "model.safetensors")
    return target, head
