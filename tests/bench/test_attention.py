"""The benchmark of attention compares ways that answer alike, and a layer's whole call with vLLM's."""

import pytest
import torch

from vllm_eagle.bench.speed import attention


@pytest.fixture
def case() -> attention.Case:
    torch.manual_seed(0)
    return attention.Case((6, 2, 64), 150, 5, torch.bfloat16)


def test_all_ways_answer_alike(case: attention.Case) -> None:
    ways = case.ways()
    if not torch.cpu._is_avx512_supported():
        del ways[attention.MASKED]
    answers = {}
    for name, work in ways.items():
        case.output.fill_(7.0)
        work()
        answers[name] = case.output.clone()
    for answer in answers.values():
        torch.testing.assert_close(answer, answers[attention.CAUSAL], atol=2e-2, rtol=2e-2)


def test_layers_are_called_as_by_the_model(case: attention.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {}

    def once(ways: dict) -> dict[str, float]:
        for name, work in ways.items():
            case.output.fill_(7.0)
            work()
            answers[name] = case.output.clone()
        return dict.fromkeys(ways, 0.0)

    monkeypatch.setattr(attention, "taking_turns", once)
    case.layers()
    assert len(answers) == 4
    assert torch.equal(answers["a layer with a tree"], answers[attention.OURS])
    assert torch.equal(answers["a layer of plain vLLM"], answers[attention.CAUSAL])


def test_the_table_names_the_share_of_vllms_time() -> None:
    ways = (attention.OURS, attention.CAUSAL, attention.MASKED, attention.BY_TORCH, attention.READING, attention.PRODUCTS)
    found = dict(zip(ways, (0.5, 1.0, 2.0, 3.0, 0.25, 0.125), strict=True))
    table = attention.table({"vllm": "x", "8B-like, context 100, 17 rows": found})
    assert table.splitlines()[2] == "| 8B-like, 100, 17 | 0.500 | 1.000 | 0.50 | 2.00 | 3.00 | 0.250 | 0.125 |"
