"""The head that a run begins with: a new one, started from what the target knows, or one that was trained before."""

from collections.abc import Sequence
from typing import Any

import torch

from vllm_eagle.train.data.examples import Example
from vllm_eagle.train.features.target import FrozenTarget, default_aux_layers, head_config
from vllm_eagle.train.head.files import load_head
from vllm_eagle.train.head.medusa import MedusaHead
from vllm_eagle.train.head.models import Eagle3Head, EagleHead, Head, aux_layers
from vllm_eagle.train.head.vocabulary import count_tokens, coverage, draft_vocabulary
from vllm_eagle.train.run.settings import TrainSettings

EAGLE3_DRAFT_VOCAB = 32000  # the authors'


def new_head(target: FrozenTarget, settings: TrainSettings, examples: Sequence[Example]) -> tuple[Head, dict[str, Any]]:
    """A head to be trained, and what the run card should say about it. `examples` choose the draft vocabulary."""
    if settings.method == "medusa":
        return MedusaHead(head_config(target.config), target.embed, target.lm_head, settings.loss.num_steps), {}
    vocab_size = target.config.vocab_size
    size = min(settings.draft_vocab or (EAGLE3_DRAFT_VOCAB if settings.method == "eagle3" else vocab_size), vocab_size)
    counts = count_tokens(((e.token_ids, e.loss_mask) for e in examples), vocab_size)
    d2t, t2d = draft_vocabulary(counts, size, target.end_tokens)  # an answer that a run has cut does not show its end
    facts = {"draft_vocab": size, "draft_vocab_coverage": round(coverage(counts, t2d), 5)}
    if settings.method == "eagle":
        plain = EagleHead(head_config(target.config, num_layers=settings.head_layers), target.embed, target.lm_head, target.finish)
        if size < vocab_size:
            plain.limit_to(t2d.nonzero()[:, 0])
        return plain, facts
    layers = chosen_aux_layers(target.config, settings)
    head = Eagle3Head(head_config(target.config, size, layers, settings.head_layers), target.embed)
    if head.target_ids is not None:
        head.d2t.copy_(d2t)
        head.t2d.copy_(t2d)
    # The target's own LM head and final norm are the best guess at what turns a feature into these tokens.
    chosen = t2d.nonzero()[:, 0]
    head.lm_head.weight.data.copy_(target.lm_head.weight.data[chosen] * target.finish.scale)
    head.norm.weight.data.copy_(target.norm_gain)
    return head, {"aux_layers": layers} | facts


def usual_length(examples: Sequence[Example]) -> int:
    """Half of all tokens stand in texts at least this long: what the head knows of contexts, for `draft_window`."""
    lengths = torch.tensor([len(example.token_ids) for example in examples]).sort(descending=True).values
    return int(lengths[int((lengths.cumsum(0) * 2 < lengths.sum()).sum())])


def chosen_aux_layers(config: Any, settings: TrainSettings) -> list[int]:
    """Layers of the target (a transformers config) that an EAGLE-3 head reads.

    Raises:
        ValueError: the target has no such layers.
    """
    num_layers = config.num_hidden_layers
    layers = list(settings.aux_layers or default_aux_layers(num_layers))
    if not all(0 <= layer <= num_layers for layer in layers):
        raise ValueError(f"--aux-layers {layers}: choose numbers from 0 to {num_layers}, the target's layers")
    return layers


def continued_head(target: FrozenTarget, settings: TrainSettings) -> tuple[Head, dict[str, Any]]:
    """The head that `--init` names, to be trained further, and what the run card should say about it.

    Raises:
        ValueError: it is of another kind than the settings ask for, or cannot be read.
    """
    path = settings.init
    assert path is not None
    head = load_head(path, target)
    kind = {EagleHead: "eagle", Eagle3Head: "eagle3", MedusaHead: "medusa"}[type(head)]
    if kind != settings.method:
        raise ValueError(f"--init {path} is a head of --method {kind}, not {settings.method}; change one of them")
    if head.max_steps is not None and head.max_steps != settings.loss.num_steps:
        raise ValueError(f"--init {path} has {head.max_steps} Medusa heads; give --unroll-steps {head.max_steps}")
    facts: dict[str, Any] = {"init": str(path)}
    if isinstance(head, Eagle3Head):
        facts |= {"aux_layers": aux_layers(head.config), "draft_vocab": head.config.draft_vocab_size}
    return head, facts
