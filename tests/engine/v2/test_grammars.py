"""Grammars along trees in vLLM's V2 runner: the tokens that it gives without speculation, with trees under the grammar, too."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.test_structured import CONSTRAINTS, _LettersInOrder
from tests.engine.v2.bed import Answers, Bed, Case
from tests.engine.v2.test_drafts import needs_triton
from tests.engine.v2.test_v2 import MANY, case, trees, with_trees
from tests.models import with_markers
from tests.tiers import exhaustive, interpreted
from vllm_eagle.pair import TARGET

# Each constraint greedy and sampled, under penalties and logprobs, and requests without one among them.
ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0, "structured": CONSTRAINTS["json"], "logprobs": 1},
    {"temperature": 1.0, "seed": 1, "structured": CONSTRAINTS["regex"]},
    MANY["sampled"],
    {"temperature": 1.0, "seed": 2, "structured": CONSTRAINTS["json"]},
    {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.3, "structured": CONSTRAINTS["choice"]},
    MANY["greedy"],
    {"temperature": 0.0, "structured": CONSTRAINTS["grammar"]},
]


@pytest.fixture(scope="module")
def plain(bed: Bed) -> tuple[Case, Answers]:
    asked = case(ASKED, 14)
    return asked, bed.run(asked)


@interpreted
@pytest.mark.parametrize(("is_async", "options", "patches"), [(True, {}, ()), (False, {"budget": True}, ("nodes_cost",))])
def test_constrained_answers_equal_those_without_speculation(
    bed: Bed, plain: tuple[Case, Answers], is_async: bool, options: dict[str, Any], patches: tuple[str, ...]
) -> None:
    """Scheduled ahead, the masks come while the pass over the nodes runs; with a budget, fewer nodes are verified than masked."""
    asked, expected = plain
    found = bed.run(with_trees(asked, trees(**options), is_async=is_async, patches=patches))
    assert found.token_ids == expected.token_ids
    assert found.stats["num_accepted"] > 0


@interpreted
@pytest.mark.parametrize("backend", ["xgrammar", "guidance"])
def test_branches_are_accepted_under_a_grammar(bed: Bed, backend: str) -> None:
    """All requests are constrained here, so what moved is theirs. A grammar that takes a tree for a chain does otherwise."""
    letters = {"regex": "[a-z0-9 .,]{40,60}"}
    params = [{"temperature": t, "seed": 7, "structured": letters} for t in (0.0, 1.0)]
    asked = case(params, 20, engine={"structured_outputs_config": {"backend": backend}})
    expected, found = bed.run(asked), bed.run(with_trees(asked, trees(), is_async=True))
    assert found.token_ids == expected.token_ids
    assert found.stats["num_moved"] > 0
    if backend == "xgrammar":
        broken = bed.run(with_trees(asked, trees(), is_async=True, patches=("chains_for_trees",)))
        assert broken.token_ids != expected.token_ids


@exhaustive
def test_grammars_that_begin_after_reasoning(bed: Bed, tmp_path: Path) -> None:
    """Such requests draft chains, which vLLM masks."""
    from transformers import AutoTokenizer

    target = with_markers(TARGET, tmp_path / "target", "<think>", "</think>")
    begin, end = AutoTokenizer.from_pretrained(target).convert_tokens_to_ids(["<think>", "</think>"])
    params = [
        {"temperature": t, "seed": 5, "structured": CONSTRAINTS["regex"], "max_tokens": 20, "logit_bias": {end: bias}}
        for t, bias in ((0.0, 15.0), (1.0, 9.0))
    ]
    prompts = [[*ids, begin] for ids in case(params, 20).prompts]
    asked = Case(str(target), prompts, params, engine={"reasoning_parser": "qwen3"})
    expected, found = bed.run(asked), bed.run(with_trees(asked, trees(), is_async=True))
    assert found.token_ids == expected.token_ids
    assert any(end in answer for answer in expected.token_ids)
    assert found.stats["num_moved"] == 0


class Letters(_LettersInOrder):
    """Over tokens 0..31; it ends with the last."""

    def is_terminated(self) -> bool:
        return self.seen[-1:] == [31]

    def fill_bitmask(self, bitmask: torch.Tensor, row: int) -> None:
        allowed = sum(1 << token for token in range(self.seen[-1] + 1 if self.seen else 0, 32))
        bitmask[row, 0] = allowed - (1 << 32 if allowed >= 1 << 31 else 0)


@needs_triton
def test_every_node_is_masked_by_its_own_path() -> None:
    from vllm_eagle.engine.v2.grammars import NO_NODE, mask_nodes

    grammar, bitmask = Letters(), torch.full((11, 1), -1, dtype=torch.int32)
    grammar.seen = [3]
    #       0: root
    tokens = [5, 8, 2, 31, 7, 9, 6, 0]
    parents = [0, 0, 0, 1, 1, 4, 2, NO_NODE]  # 2 after 3, and 6 after 8, are forbidden; 9 comes after the end
    assert mask_nodes(grammar, tokens, parents, bitmask, 1) == 3  # type: ignore[arg-type]
    allowed = [[token for token in range(32) if row >> token & 1] for row in bitmask[:, 0].tolist()]
    after = {1: 3, 2: 5, 3: 8, 6: 7}  # by row: root, 5, 8, 7
    for row, found in enumerate(allowed):
        assert found == list(range(after[row] + 1 if row in after else 0, 32)), row
    assert grammar.seen == [3]


@needs_triton
def test_parents_go_with_the_copy_of_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """To other processes as well; where no request is constrained nothing is copied."""
    import pickle
    from types import SimpleNamespace

    from vllm.v1.worker.gpu.spec_decode import utils

    from vllm_eagle.engine.v2.grammars import NO_NODE, TreeTokens, parents_of
    from vllm_eagle.engine.v2.slots import SlotTrees

    found = TreeTokens.__new__(TreeTokens)
    found._trees = trees_of = SlotTrees(3, 5, torch.device("cpu"))
    trees_of.parents[2], trees_of.num_nodes[2] = torch.tensor([0, 0, 0, 2, 1]), 4
    batch = SimpleNamespace(idx_mapping=torch.tensor([2, 0]), req_ids=["a", "b"], has_structured_output_reqs=True)

    def copied(self: Any, batch: Any, draft_tokens: torch.Tensor) -> None:
        self.req_ids, self.num_draft_tokens = batch.req_ids, draft_tokens.shape[1]
        self.draft_tokens_np = draft_tokens.numpy() if batch.has_structured_output_reqs else None
        self.copy_event = SimpleNamespace(synchronize=lambda: None)

    monkeypatch.setattr(utils.DraftTokensHandler, "set_draft_tokens", copied)
    found.set_draft_tokens(batch, torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24]]))  # type: ignore[arg-type]
    drafts = pickle.loads(pickle.dumps(found.get_draft_tokens()))
    assert drafts.draft_token_ids == [[11, 12, 13, 14], [21, 22, 23, 24]]
    assert parents_of(drafts) == [[0, 0, 2, NO_NODE], [NO_NODE] * 4]
    batch.has_structured_output_reqs = False
    found.set_draft_tokens(batch, torch.tensor([[11, 12], [21, 22]]))  # type: ignore[arg-type]
    drafts = found.get_draft_tokens()
    assert drafts is not None
    assert drafts.draft_token_ids == [[-1, -1]] * 2
    assert parents_of(drafts) == [[], []]
