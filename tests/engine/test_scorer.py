"""Sampling after all nodes at once gives what sampling depth by depth gives, and uses the same noise."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import LogitBiasLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from vllm_eagle.algorithm.accept import Walk
from vllm_eagle.algorithm.node_noise import node_generators
from vllm_eagle.algorithm.noise import draw_seed
from vllm_eagle.algorithm.tree import DraftTree
from vllm_eagle.engine.v1.scorer import EagleTreeScorer, is_row_wise

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
CASES: dict[str, dict[str, Any]] = {
    "all sampled": {"temperatures": [1.0, 0.7, 1.3, 1.0, 1.0]},
    "some greedy": {"temperatures": [1.0, 0.0, 0.0, 0.5, 1.0]},
    "top-k and top-p": {
        "temperatures": [1.0, 0.7, 1.0, 0.0, 1.0],
        "top_k": torch.tensor([3, VOCAB, 5, VOCAB, 2]),
        "top_p": torch.tensor([1.0, 0.8, 0.9, 1.0, 0.5]),
    },
}


def score(case: dict[str, Any], exact: bool, step: int) -> tuple[list[Walk], list[torch.Tensor]]:
    """Walks, and the states of the generators afterwards."""
    chosen = metadata(**case)
    num_rows = sum(tree.num_nodes for tree in TREES)
    logits = torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(step))
    outputs: list[list[int]] = [[] for _ in TREES]
    with torch.inference_mode():
        out, walks = EagleTreeScorer(Sampler(use_fp64_gumbel=exact), 1000).score(logits, TREES, chosen, outputs, DISCARDED, {})
    assert out.sampled_token_ids[0, : len(walks[0].token_ids)].tolist() == walks[0].token_ids
    return walks, [generator.get_state() for generator in chosen.generators.values()]


@pytest.mark.parametrize("exact", [False, True], ids=["a seed per row", "a row of noise"])
@pytest.mark.parametrize("case", CASES)
def test_at_once_as_depth_by_depth(case: str, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    depths = set()
    for step in range(20):
        in_turn, expected = score(CASES[case], exact, step)
        with monkeypatch.context() as context:
            context.setattr(EagleTreeScorer, "_at_once_is_cheap", lambda *args: True)
            at_once, states = score(CASES[case], exact, step)
        kept = [i for i in range(len(TREES)) if i not in DISCARDED]
        assert [at_once[i].token_ids for i in kept] == [in_turn[i].token_ids for i in kept]
        assert [at_once[i].path for i in kept] == [in_turn[i].path for i in kept]
        assert all(one.equal(other) for one, other in zip(states, expected, strict=True))
        assert states[-1].equal(torch.Generator().manual_seed(len(TREES) - 1).get_state())  # of the discarded one
        depths |= {len(walk.path) for walk in at_once}
    assert depths == {0, 1, 2, 3}


def test_one_call_for_all_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    forward = Sampler.forward
    monkeypatch.setattr(Sampler, "forward", lambda self, logits, *args, **kwargs: [rows.append(len(logits)), forward(self, logits, *args, **kwargs)][1])  # fmt: skip  # noqa: E501
    score(CASES["all sampled"], False, 0)
    assert len(rows) > 1
    assert set(rows) == {len(TREES)}
    rows.clear()
    monkeypatch.setattr(EagleTreeScorer, "_at_once_is_cheap", lambda *args: True)
    score(CASES["all sampled"], False, 0)
    assert rows == [sum(tree.num_nodes for tree in TREES)]


def test_when_at_once() -> None:
    """On a GPU, unless there is no memory for so many rows; on a CPU where nothing is drawn and sorted."""
    on_cpu, elsewhere = (torch.empty(20, VOCAB, device=device) for device in ("cpu", "meta"))
    for most_rows, logits, greedy, expected in (
        (20, elsewhere, False, True),
        (19, elsewhere, False, False),
        (19, elsewhere, True, True),
        (20, on_cpu, False, False),
        (20, on_cpu, True, True),
        (20, torch.empty(20, 1 << 16), True, False),
    ):
        assert EagleTreeScorer(Sampler(), most_rows)._at_once_is_cheap(logits, greedy) is expected


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
    assert is_row_wise(metadata([1.0, 0.0]))
    assert not is_row_wise(metadata([1.0, 0.0], **changes))


class Custom(LogitBiasLogitsProcessor):  # type: ignore[misc]
    """A processor that keeps to itself what it does."""

    def __init__(self, argmax_invariant: bool):
        self.biases = {0: {1: 1.0}}
        self._argmax_invariant = argmax_invariant

    def is_argmax_invariant(self) -> bool:
        return self._argmax_invariant


def test_processors_are_asked_depth_by_depth() -> None:
    for argmax_invariant, temperature, expected in (
        (False, 0.0, False),
        (False, 1.0, False),
        (True, 1.0, False),
        (True, 0.0, True),
    ):
        processors = LogitsProcessors([Custom(argmax_invariant)])
        assert is_row_wise(metadata([temperature], logitsprocs=processors)) is expected


def test_noise_of_nodes() -> None:
    """Of one depth the same, of the next one the next; the generator itself is left alone, as after an error."""
    generator, twin = (torch.Generator().manual_seed(3) for _ in range(2))
    found = node_generators(generator, [0, 1, 1, 3], draw_seed)
    coming = [int(draw_seed(twin)) for _ in range(4)]
    assert [int(draw_seed(one)) for one in found] == [coming[0], coming[1], coming[1], coming[3]]
    assert int(draw_seed(generator)) == coming[0]

    def broken(generator: torch.Generator) -> None:
        draw_seed(generator)
        raise RuntimeError

    before = generator.get_state()
    with pytest.raises(RuntimeError):
        node_generators(generator, [0, 1], broken)
    assert generator.get_state().equal(before)


def test_greedy_batches_have_no_temperatures() -> None:
    """As vLLM hands them over."""
    chosen = replace(metadata([0.0] * len(TREES)), temperature=None)
    logits = torch.randn(sum(tree.num_nodes for tree in TREES), VOCAB, generator=torch.Generator().manual_seed(0))
    _, walks = EagleTreeScorer(Sampler(), 1000).score(logits, TREES, chosen, [[] for _ in TREES], DISCARDED, {})
    assert walks[1].token_ids == [int(logits[TREES[0].num_nodes].argmax())]
