"""Grammars along trees: the same tokens as without speculation, with every backend that can roll back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.output import GrammarOutput

from tests.engine.engines import engine, generate, tokens, tree_stats, trees
from tests.models import with_markers
from tests.tiers import exhaustive
from vllm_eagle.algorithm.draft import Level
from vllm_eagle.engine import seams
from vllm_eagle.engine.v1.grammar import DraftConstraints, TreeGrammars, apply_masks
from vllm_eagle.pair import HEAD, TARGET

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["a", "bb", "ccc"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
}
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "json": {"json": PERSON},
    "regex": {"regex": r"\d{1,3} (apples|pears) and (\d+) more"},
    "choice": {"choice": ["yes it is", "yes it was", "no"]},
    "grammar": {"grammar": 'root ::= "(" root ")" | "x" | root2\nroot2 ::= "[" root "]"'},
}
QUESTIONS = ("Tom has 3 apples and buys 4 more. How many?", "Describe a person.", "How fast is a train?", "Pick one.")


def requests(llm: LLM, names: list[str]) -> tuple[list[list[int]], list[SamplingParams]]:
    """Each constraint greedy and sampled, and as many requests without one among them."""
    tokenizer = llm.get_tokenizer()
    prompts, params = [], []
    for i, name in enumerate([*names, None] * 2):
        chat = [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}]
        prompts.append(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
        constraint = StructuredOutputsParams(**CONSTRAINTS[name]) if name else None
        temperature = 0.0 if i <= len(names) else 1.0
        params.append(SamplingParams(temperature=temperature, seed=i, max_tokens=48, logprobs=1, structured_outputs=constraint))
    return prompts, params


@pytest.mark.parametrize("backend", ["xgrammar", "guidance", "outlines"])
def test_constrained_answers_equal_those_without_speculation(backend: str) -> None:
    names = ["json", "regex", "choice", *(["grammar"] if backend != "outlines" else [])]
    settings = {"structured_outputs_config": {"backend": backend}}
    with engine(TARGET, **settings) as llm:
        prompts, params = requests(llm, names)
        expected = tokens(generate(llm, prompts, params))
    with engine(TARGET, **settings, **trees(HEAD)) as llm:
        assert tokens(generate(llm, prompts, params)) == expected
        stats = tree_stats(llm)
        assert stats["tau"] > 2
        assert stats["num_moved"] > 0  # branches were accepted, not only chains


@exhaustive
@pytest.mark.parametrize("options", [{"mode": "static"}, {"mode": "chain"}, {"coupled": False, "topk": 3}])
def test_other_trees_under_grammars(options: dict[str, Any]) -> None:
    with engine(TARGET) as llm:
        prompts, params = requests(llm, ["json", "regex"])
        expected = tokens(generate(llm, prompts, params))
    with engine(TARGET, **trees(HEAD, **options)) as llm:
        assert tokens(generate(llm, prompts, params)) == expected


@exhaustive
def test_grammars_that_begin_after_reasoning(tmp_path: Path) -> None:
    """In each mode the grammar begins at the end of reasoning, wherever that comes."""
    target = with_markers(TARGET, tmp_path / "target", "<think>", "</think>")
    with engine(target, reasoning_parser="qwen3") as llm:
        begin, end = llm.get_tokenizer().convert_tokens_to_ids(["<think>", "</think>"])
        prompts, params = requests(llm, ["json", "regex"])
        prompts = [[*prompt, begin] for prompt in prompts]
        for each in params:
            each.logit_bias = {end: 9.0 if each.temperature else 15.0}
        expected = tokens(generate(llm, prompts, params))
    lengths = [answer.index(end) for [answer] in expected if end in answer]
    assert len(lengths) >= len(expected) // 2
    assert max(lengths) > 2
    for mode in ("dynamic", "static", "chain"):
        with engine(target, reasoning_parser="qwen3", **trees(HEAD, mode=mode)) as llm:
            assert tokens(generate(llm, prompts, params)) == expected, mode


def test_constrained_requests_survive_preemption() -> None:
    """A resumed request's grammar goes on where it was."""
    with engine(TARGET, max_model_len=256) as llm:
        prompts, params = requests(llm, ["json", "json", "regex", "json"])
        expected = tokens(generate(llm, prompts, params))
    tight = {"max_model_len": 256, "num_gpu_blocks_override": 10, "enable_prefix_caching": False}
    with engine(TARGET, **tight, **trees(HEAD)) as llm:
        assert tokens(generate(llm, prompts, params)) == expected
        assert sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions") > 0


ONE_BACKEND = seams.known_version() != "0.32"  # from 0.33 on vLLM refuses requests for another backend than the first one's


@pytest.mark.skipif(ONE_BACKEND, reason="vLLM refuses the second backend")
def test_worker_and_scheduler_use_one_backend() -> None:
    """The scheduler's is that of the first request received, though the worker never sees that one."""
    first = StructuredOutputsParams(json={"type": "integer", "multipleOf": 5})  # which xgrammar cannot do
    answers, backends = [], []
    for changes in ({}, trees(HEAD)):
        with engine(TARGET, **changes) as llm:
            params = SamplingParams(temperature=0, max_tokens=8, structured_outputs=first)
            llm.llm_engine.abort_request([llm.llm_engine.add_request("first", {"prompt_token_ids": [5, 6]}, params)], internal=True)
            answers.append(tokens(generate(llm, *requests(llm, ["json", "regex"]))))
            manager = llm.llm_engine.engine_core.engine_core.scheduler.structured_output_manager
            backends.append(type(manager.backend).__name__)
            if changes:
                own = llm.collective_rpc(lambda worker: worker.model_runner._grammars._manager.backend)[0]
                backends.append(type(own).__name__)
    assert answers[0] == answers[1]
    assert backends == ["GuidanceBackend"] * 3


@pytest.mark.skipif(not ONE_BACKEND, reason="vLLM 0.32 gives the second request the first one's backend")
def test_a_second_backend_is_refused_as_without_trees_and_harms_no_other_request() -> None:
    first = StructuredOutputsParams(json={"type": "integer", "multipleOf": 5})  # which xgrammar cannot do
    params = SamplingParams(temperature=0, max_tokens=8, structured_outputs=first)
    answers = []
    for changes in ({}, trees(HEAD)):
        with engine(TARGET, **changes) as llm:
            llm.llm_engine.abort_request([llm.llm_engine.add_request("first", {"prompt_token_ids": [5, 6]}, params)], internal=True)
            prompts, mixed = requests(llm, ["json"])
            with pytest.raises(VLLMValidationError, match=r"already using 'guidance', but this request resolved to 'xgrammar'"):
                llm.llm_engine.add_request("second", {"prompt_token_ids": prompts[0]}, mixed[0].clone())
            llm.llm_engine.abort_request(["second"])  # in this process vLLM would wait for its answer
            asked = [params, mixed[1], params.clone(), mixed[1]]
            asked[2].temperature, asked[2].seed = 1.0, 3
            answers.append(tokens(generate(llm, prompts, asked)))
            if changes:
                own = llm.collective_rpc(lambda worker: worker.model_runner._grammars._manager.backend)[0]
                assert type(own).__name__ == "GuidanceBackend"
    assert answers[0] == answers[1]


class _LettersInOrder:
    """A grammar over tokens 0..n: each must be greater than the one before."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def validate_tokens(self, token_ids: list[int]) -> list[int]:
        last = self.seen[-1] if self.seen else -1
        for i, token in enumerate(token_ids):
            if token <= last:
                return token_ids[:i]
            last = token
        return token_ids

    def accept_tokens(self, request_id: str, token_ids: list[int]) -> bool:
        self.seen += token_ids
        return True

    def rollback(self, num_tokens: int) -> None:
        del self.seen[len(self.seen) - num_tokens :]


def test_drafting_masks_every_node_by_its_own_path() -> None:
    grammar = _LettersInOrder()

    def mask(found: _LettersInOrder) -> np.ndarray:
        last = found.seen[-1] if found.seen else -1
        return np.array([sum(1 << token for token in range(last + 1, 8))], dtype=np.int32)

    constraints = DraftConstraints({1: grammar}, mask)  # type: ignore[arg-type,dict-item]
    root = constraints.root(torch.zeros(2, 8))
    assert root.eq(0).all()
    level = Level(1, torch.tensor([[0, 1], [2, 5]]), torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 2, 2, dtype=torch.bool))
    allowed = constraints.level(level, torch.zeros(2, 2, 8)).isfinite()
    assert allowed[0].all()  # no grammar
    assert allowed[1].nonzero().tolist() == [[0, token] for token in range(3, 8)] + [[1, token] for token in range(6, 8)]
    # 7 after 5 (row 1), 3 after 2 (row 0): parents are rows of the level before
    level = Level(2, torch.tensor([[0, 1], [7, 3]]), torch.tensor([[0, 0], [1, 0]]), torch.zeros(2, 2, 4, dtype=torch.bool))
    allowed = constraints.level(level, torch.zeros(2, 2, 8)).isfinite()
    assert allowed[1].nonzero().tolist() == [[1, token] for token in range(4, 8)]
    assert grammar.seen == []


@pytest.mark.parametrize("follow_trees", [True, False])
@pytest.mark.parametrize("rows_per_request", [None, 5], ids=["vllm-0.32", "vllm-0.33"])
def test_each_request_gets_its_own_rows_of_the_schedulers_bitmask(rows_per_request: int | None, follow_trees: bool) -> None:
    """As many rows as nodes that the scheduler masks (0.32), or a block of fixed width, of which the rest is anything (0.33)."""
    req_ids, num_nodes = ["a", "b", "c", "d"], [2, 5, 1, 4]
    constrained = ["d", "a", "c"]
    rows: list[list[int]] = []
    for req_id in constrained:
        count = 1 if follow_trees else num_nodes[req_ids.index(req_id)]
        rows += [[ord(req_id), node] for node in range(count)] + [[0, 0]] * ((rows_per_request or count) - count)
    grammars = TreeGrammars.__new__(TreeGrammars)
    grammars._follow_trees = follow_trees
    masks = grammars.masks(req_ids, num_nodes, GrammarOutput(constrained, np.array(rows, dtype=np.int32)))
    assert masks.keys() == {0, 2, 3}
    for place, mask_after in masks.items():
        for node in range(1 if follow_trees else num_nodes[place]):
            found = mask_after(node)
            assert found is not None
            assert found.tolist() == [ord(req_ids[place]), node]


def test_masks_touch_their_rows_alone() -> None:
    logits = torch.randn(3, 40, dtype=torch.bfloat16)
    allowed = np.array([0b101, 1 << 7], dtype=np.int32)
    masked = apply_masks(logits.clone(), {1: allowed})
    assert torch.equal(masked[[0, 2]], logits[[0, 2]])
    assert masked[1].isfinite().nonzero().flatten().tolist() == [0, 2, 39]
    assert torch.equal(masked[1, [0, 2, 39]], logits[1, [0, 2, 39]])
