"""Options of one request: they change how fast it gets, never what it emits."""

from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.engine.engines import engine, generate, tokens, tree_stats, trees
from vllm_eagle.engine.v1 import runner
from vllm_eagle.engine.v1.backlog import Backlog
from vllm_eagle.options.per_request import RequestOptions
from vllm_eagle.pair import HEAD, TARGET

PROMPT = list(range(5, 45))


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        (
            {"eagle_nodes": 3},
            "argument .eagle_nodes.; known ones: eagle_num_draft_tokens, eagle_max_depth, eagle_topk",
        ),
        ({"eagle_num_draft_tokens": 17}, "eagle_num_draft_tokens=17 is not possible here; set .* from 0 to 16"),
        ({"eagle_num_draft_tokens": -1}, "from 0 to 16"),
        ({"eagle_num_draft_tokens": "4"}, "integer"),
        ({"eagle_max_depth": 0}, "from 1 to 16"),
        ({"eagle_topk": 1.5}, "integer"),
        ({"eagle_topk": True}, "integer"),
    ],
)
def test_impossible_request_options_are_refused(extra_args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RequestOptions.from_extra_args(extra_args, 16)


def test_arguments_of_others_are_left_alone() -> None:
    assert RequestOptions.from_extra_args({"other": "x", "eagle_topk": 2}, 16) == RequestOptions(topk=2)
    assert RequestOptions.from_extra_args(None) == RequestOptions()


def recorded(llm: Any, params: SamplingParams) -> tuple[list[list[list[int]]], list[dict[str, Any]]]:
    """Tokens of one request, and the trees that were verified for it."""
    llm.collective_rpc("eagle_trace", args=(1 << 20,))
    found = tokens(generate(llm, [PROMPT], params))
    return found, llm.collective_rpc("eagle_traced")[0]


def depth(tree: dict[str, Any]) -> int:
    depths = [0]
    for parent in tree["parents"][1:]:
        depths.append(depths[parent] + 1)
    return max(depths)


def test_a_request_can_have_a_smaller_tree_or_none() -> None:
    def params(**extra_args: Any) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, extra_args=extra_args)

    with engine(TARGET, **trees(HEAD)) as llm:
        expected, verified = recorded(llm, params())
        assert {len(tree["parents"]) for tree in verified} >= {17}
        found, verified = recorded(llm, params(eagle_num_draft_tokens=0))
        assert (found, verified) == (expected, [])
        assert tree_stats(llm)["decisions"]["switched_off"] == 40
        found, verified = recorded(llm, params(eagle_num_draft_tokens=5))
        assert found == expected
        assert max(len(tree["parents"]) for tree in verified) == 6
        found, verified = recorded(llm, params(eagle_topk=1))
        assert found == expected
        assert all(tree["parents"][1:] == list(range(len(tree["parents"]) - 1)) for tree in verified)
        found, verified = recorded(llm, params(eagle_max_depth=2, eagle_topk=3))
        assert found == expected
        assert max(map(depth, verified)) == 2
        assert max(tree["parents"].count(0) for tree in verified) == 4  # three children, and the root itself

        with pytest.raises(VLLMValidationError, match="eagle_topk=99"):
            generate(llm, [PROMPT], params(eagle_topk=99))
        assert recorded(llm, params())[0] == expected


def test_vllms_schedule_by_batch_size_limits_trees(random_models: dict[str, Path]) -> None:
    """`num_speculative_tokens_per_batch_size`: first and last number of requests, and most nodes."""
    prompts = [[i, *PROMPT] for i in range(1, 4)]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    with engine(random_models["target"]) as llm:
        expected = [tokens(generate(llm, prompts[:number], params)) for number in (1, 2, 3)]
    options = trees(random_models["eagle"], 16)
    speculative = {"model": str(options.pop("spec_model")), "num_speculative_tokens": options.pop("spec_tokens")}
    speculative["num_speculative_tokens_per_batch_size"] = [(1, 1, 16), (2, 2, 5), (3, 64, 0)]
    with engine(random_models["target"], speculative_config=speculative, **options) as llm:
        for number, most, answers in zip((1, 2, 3), (17, 6, 1), expected, strict=True):
            llm.collective_rpc("eagle_trace", args=(1 << 20,))
            assert tokens(generate(llm, prompts[:number], params)) == answers
            sizes = [len(tree["parents"]) for tree in llm.collective_rpc("eagle_traced")[0]]
            assert max(sizes, default=1) == most


def test_for_a_request_without_speculation_nothing_is_put_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put aside for the head takes memory that others need."""
    put_aside: set[str] = set()
    keep = Backlog.keep

    def spying(self: Backlog, *args: Any) -> None:
        put_aside.update(args[-1])
        keep(self, *args)

    monkeypatch.setattr(Backlog, "keep", spying)
    with engine(TARGET, **trees(HEAD)) as llm:
        for most in (0, 4):
            args = {"eagle_num_draft_tokens": most}
            params = [SamplingParams(temperature=0, max_tokens=20 + i, ignore_eos=True, extra_args=args) for i in range(2)]
            generate(llm, [PROMPT, PROMPT[:20]], params)
            assert bool(put_aside) == bool(most)  # an answer's last token is not drafted for either


def test_what_was_not_checked_before_the_worker_harms_nobody(
    random_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the plugin is not loaded, only the worker reads the options."""
    monkeypatch.setattr(SamplingParams, "_validate_spec_decode", lambda self, config: None)
    errors: list[tuple[Any, ...]] = []
    monkeypatch.setattr(runner.logger, "error", lambda *message: errors.append(message))
    outputs = []
    for changes in ({}, trees(random_models["eagle"])):
        params = [SamplingParams(temperature=0, max_tokens=12, extra_args=x) for x in (None, {"eagle_nodes": 3})]
        with engine(random_models["target"], **changes) as llm:
            outputs.append(tokens(generate(llm, [PROMPT, PROMPT[:9]], params)))
    assert outputs[0] == outputs[1]
    assert ["unknown extra argument 'eagle_nodes'" in str(message[2]) for message in errors] == [True]


def test_options_mix_in_one_batch(random_models: dict[str, Path]) -> None:
    prompts = [[i, *PROMPT] for i in range(1, 9)]
    extra: list[dict[str, Any] | None] = [
        None,
        {"eagle_num_draft_tokens": 0},
        {"eagle_topk": 1},
        {"eagle_max_depth": 1},
        {"eagle_num_draft_tokens": 3, "eagle_topk": 2},
        {"eagle_max_depth": 3},
        {"eagle_num_draft_tokens": 1},
        {"other": 1},
    ]
    outputs = []
    for changes in ({}, trees(random_models["eagle"]), trees(random_models["eagle3"], mode="static")):
        params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=24, extra_args=x) for i, x in enumerate(extra)]
        with engine(random_models["target"], **changes) as llm:
            outputs.append(tokens(generate(llm, prompts, params)))
    assert outputs[0] == outputs[1] == outputs[2]
