"""Sampling after all nodes at once gives what sampling depth by depth gives; it is done for greedy requests alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import LogitBiasLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from vllm_eagle.algorithm.accept import Walk
from vllm_eagle.algorithm.tree import DraftTree
from vllm_eagle.engine.v1 import scorer
from vllm_eagle.engine.v1.scorer import EagleTreeScorer, is_greedy_row_by_row

VOCAB = 8  # so that walks go deep


def metadata(temperatures: list[float], **changes: Any) -> SamplingMetadata:
    none = torch.zeros(len(temperatures))
    usual: dict[str, Any] = {
        "temperature": torch.tensor(temperatures),
        "all_greedy": not any(temperatures),
        "all_random": all(temperatures),
        "top_p": None,
        "top_k": None,
        "generators": {i: torch.Generator().manual_seed(i) for i, t in enumerate(temperatures) if t},
        "max_num_logprobs": None,
        "no_penalties": True,
        "prompt_token_ids": None,
        "frequency_penalties": none,
        "presence_penalties": none,
        "repetition_penalties": none,
        "output_token_ids": [[] for _ in temperatures],
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {},
        "logitsprocs": LogitsProcessors(),
    }
    return SamplingMetadata(**(usual | changes))


def complete_tree(children: int, depth: int) -> DraftTree:
    """Every node above the last level has children with tokens 0, 1, ..."""
    tokens, parents = [0], [0]
    level = [0]
    for _ in range(depth):
        below = []
        for parent in level:
            for token in range(children):
                below.append(len(tokens))
                tokens.append(token)
                parents.append(parent)
        level = below
    as_array = torch.tensor([tokens, parents]).numpy()
    return DraftTree(as_array[0], as_array[1], torch.zeros(len(tokens)).numpy())


TREES = [complete_tree(6, 2), DraftTree.root_only(1), DraftTree.chain([0, 1, 1, 2]), complete_tree(3, 3), DraftTree.root_only(-1)]
DISCARDED = {4}  # its prompt goes on


def score(temperatures: list[float], seed: int) -> list[Walk]:
    num_rows = sum(tree.num_nodes for tree in TREES)
    logits = torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed))
    outputs: list[list[int]] = [[] for _ in TREES]
    with torch.inference_mode():
        out, walks = EagleTreeScorer(Sampler()).score(logits, TREES, metadata(temperatures), outputs, DISCARDED, {})
    assert out.sampled_token_ids[0, : len(walks[0].token_ids)].tolist() == walks[0].token_ids
    assert not any(outputs)
    return walks


def test_at_once_as_depth_by_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    forward = Sampler.forward
    monkeypatch.setattr(Sampler, "forward", lambda self, logits, *args, **kwargs: [rows.append(len(logits)), forward(self, logits, *args, **kwargs)][1])  # fmt: skip  # noqa: E501
    depths = set()
    for seed in range(20):
        at_once = score([0.0] * len(TREES), seed)
        assert rows == [sum(tree.num_nodes for tree in TREES)]
        rows.clear()
        with monkeypatch.context() as context:
            context.setattr(scorer, "_MOST_SCORES", 0)
            in_turn = score([0.0] * len(TREES), seed)
        assert set(rows) == {len(TREES)}
        rows.clear()
        assert [walk.token_ids for walk in at_once] == [walk.token_ids for walk in in_turn]
        assert [walk.path for walk in at_once] == [walk.path for walk in in_turn]
        depths |= {len(walk.path) for walk in at_once}
    assert depths == {0, 1, 2, 3}


def test_who_samples_is_sampled_depth_by_depth() -> None:
    assert is_greedy_row_by_row(metadata([0.0, 0.0]))
    assert not is_greedy_row_by_row(metadata([0.0, 1.0]))


@pytest.mark.parametrize(
    "changes",
    [
        {"no_penalties": False},
        {"max_num_logprobs": 0},
        {"logprob_token_ids": {0: [1]}},
        {"allowed_token_ids_mask": torch.zeros(2, VOCAB, dtype=torch.bool)},
        {"bad_words_token_ids": {0: [[1]]}},
    ],
)
def test_what_knows_more_than_the_row_is_sampled_depth_by_depth(changes: dict[str, Any]) -> None:
    assert is_greedy_row_by_row(metadata([0.0, 0.0]))
    assert not is_greedy_row_by_row(metadata([0.0, 0.0], **changes))


class Custom(LogitBiasLogitsProcessor):  # type: ignore[misc]
    """A processor that keeps to itself what it does."""

    def __init__(self, argmax_invariant: bool):
        self.biases = {0: {1: 1.0}}
        self._argmax_invariant = argmax_invariant

    def is_argmax_invariant(self) -> bool:
        return self._argmax_invariant


def test_processors_are_asked_depth_by_depth() -> None:
    for argmax_invariant in (False, True):
        processors = LogitsProcessors([Custom(argmax_invariant)])
        assert is_greedy_row_by_row(metadata([0.0], logitsprocs=processors)) is argmax_invariant


def test_greedy_batches_have_no_temperatures() -> None:
    """As vLLM hands them over."""
    chosen = replace(metadata([0.0] * len(TREES)), temperature=None)
    logits = torch.randn(sum(tree.num_nodes for tree in TREES), VOCAB, generator=torch.Generator().manual_seed(0))
    _, walks = EagleTreeScorer(Sampler()).score(logits, TREES, chosen, [[] for _ in TREES], DISCARDED, {})
    assert walks[1].token_ids == [int(logits[TREES[0].num_nodes].argmax())]
