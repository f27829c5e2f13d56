"""Trees in full CUDA graphs, captured and replayed without a GPU (graphs.py): the tokens are those of plain decoding."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.v2 import graphs
from tests.engine.v2.bed import Answers, Bed, Case, prompts_of
from tests.engine.v2.test_v2 import MANY, case, trees, with_trees
from tests.models import random_eagle3_head, random_target
from tests.tiers import exhaustive, interpreted
from vllm_eagle.bench.engines.drafters import ours
from vllm_eagle.pair import TARGET

SIZES = (3, 27)  # passes of 1 and 3 requests with 8 drafts, levels of 3 requests: the rest is padding


def slow_but(first: tuple[Any, ...], *others: tuple[Any, ...]) -> list[Any]:
    """Cases of which the exhaustive tier runs the first."""
    return [pytest.param(*first, marks=exhaustive), *(pytest.param(*other, marks=interpreted) for other in others)]


@pytest.fixture(scope="module")
def plain(bed: Bed) -> tuple[Case, Answers]:
    """More requests than run at a time, of unequal lengths: they come and go, and batches are padded."""
    params = [MANY[kind] | {"max_tokens": 5 + 3 * i} for i, kind in enumerate(("greedy", "sampled", "filtered", "greedy"))]
    asked = case(params, 0, engine={"max_num_seqs": 3})
    return asked, bed.run(asked)


@pytest.mark.parametrize(
    ("options", "patches"),
    slow_but(({}, ("splits",)), ({"mode": "static"}, ()), ({"mode": "chain"}, ()), ({"coupled": False}, ())),
)
def test_tokens_are_those_of_plain_decoding(
    bed: Bed, plain: tuple[Case, Answers], options: dict[str, Any], patches: tuple[str, ...]
) -> None:
    asked, expected = plain
    found = bed.run(with_trees(asked, trees(**options), is_async=True, capture_sizes=SIZES, patches=patches))
    assert found.token_ids == expected.token_ids
    # Of every step that only decodes: the target's pass, the head's first pass, its levels.
    assert found.stats["graphs"]["replayed"] > 2 * found.stats["num_passes"]
    assert found.stats["num_moved"] > (0 if options.get("mode") != "chain" else -1)


@interpreted
def test_prompts_beside_trees_are_no_part_of_a_graph(bed: Bed, plain: tuple[Case, Answers]) -> None:
    """Prompts in pieces, and few blocks: captured passes, divided ones and requests that are computed anew take turns."""
    asked, expected = plain
    engine = trees() | {"max_num_batched_tokens": 64, "enable_chunked_prefill": True, "num_gpu_blocks_override": 10}
    found = bed.run(with_trees(asked, engine, is_async=True, capture_sizes=SIZES))
    assert found.token_ids == expected.token_ids
    assert found.stats["graphs"]["replayed"] > 10


@interpreted
def test_requests_with_unequal_numbers_of_rows(bed: Bed) -> None:
    """As with vLLM's adaptive verification; here because the model's length ends in the middle of trees."""
    longest = max(map(len, prompts_of(TARGET, 2)))
    asked = case([MANY["greedy"], MANY["sampled"]], 40, engine={"max_model_len": longest + 13, "max_num_seqs": 3})
    graphs_of_any_rows = with_trees(asked, trees(), is_async=True, capture_sizes=SIZES, patches=("graphs_of_any_rows",))
    uniform = with_trees(asked, trees(), is_async=True, capture_sizes=SIZES)
    answers = [bed.run(each) for each in (asked, graphs_of_any_rows, uniform)]
    assert answers[0].token_ids == answers[1].token_ids == answers[2].token_ids
    assert answers[1].stats["graphs"]["replayed"] > answers[2].stats["graphs"]["replayed"]


@pytest.mark.parametrize(
    ("is_async", "patches"),
    slow_but(
        (True, ("splits", "nodes_cost")),
        (False, ("nodes_cost", "launches_between_replays")),
        (True, ("drafting_never_pays",)),
        (True, ()),
    ),
)
def test_a_budget(bed: Bed, plain: tuple[Case, Answers], is_async: bool, patches: tuple[str, ...]) -> None:
    """How many nodes of each tree are verified is decided on the device: captured passes take any number.

    Levels that are planned far narrower than they were captured run launch by launch.
    """
    asked, expected = plain
    found = bed.run(with_trees(asked, trees(budget=True), is_async=is_async, capture_sizes=SIZES, patches=patches))
    assert found.token_ids == expected.token_ids
    stats = found.stats
    assert stats["graphs"]["replayed"] > stats["num_passes"] / 2
    if "nodes_cost" in patches:
        assert len({size for size, number in enumerate(stats["trees_of_size"]) if number}) > 2
    if "splits" in patches:
        assert stats["graphs"]["replayed"] > 1.2 * stats["num_passes"]  # the target's passes, and most drafting


@interpreted
def test_drafting_that_fails(bed: Bed, plain: tuple[Case, Answers]) -> None:
    """From then on captured passes are over roots alone."""
    asked, expected = plain
    found = bed.run(with_trees(asked, trees(budget=True), capture_sizes=SIZES, patches=("drafting_fails", "nodes_cost")))
    assert found.token_ids == expected.token_ids
    assert found.stats["num_drafting_errors"] == 1
    assert found.stats["graphs"]["replayed"] > found.stats["num_passes"] / 2


@interpreted
def test_options_of_requests(bed: Bed, plain: tuple[Case, Answers]) -> None:
    """Fewer nodes, fewer levels, chains: read on the device, in graphs for more."""
    asked, expected = plain
    options: list[dict[str, Any]] = [{}, {"eagle_max_depth": 1}, {"eagle_topk": 1}, {"eagle_num_draft_tokens": 2}]
    params = [each | {"extra_args": own} for each, own in zip(asked.params, options, strict=True)]
    found = bed.run(with_trees(replace(asked, params=params), trees(), is_async=True, capture_sizes=SIZES))
    assert found.token_ids == expected.token_ids
    assert found.stats["graphs"]["replayed"] > found.stats["num_passes"]


@interpreted
def test_eagle3(bed: Bed, tmp_path: Path) -> None:
    target, head = random_target(tmp_path / "target"), random_eagle3_head(tmp_path / "head")
    params = [MANY["greedy"] | {"max_tokens": 9}, MANY["sampled"] | {"max_tokens": 6}]
    asked = Case(str(target), [[5, 6, 7, 8], [9, 10]], params, engine={"max_num_seqs": 3})
    engine = ours(str(head), 8, budget=False, topk=3, max_depth=3)
    expected = bed.run(asked).token_ids
    found = bed.run(with_trees(asked, engine, is_async=True, capture_sizes=SIZES))
    assert found.token_ids == expected
    assert found.stats["graphs"]["replayed"] > found.stats["num_passes"]


@exhaustive
def test_stale_trees_are_noticed(bed: Bed, plain: tuple[Case, Answers]) -> None:
    """Where they are put into other tensors than those that a graph was captured with."""
    asked, expected = plain
    assert bed.run(with_trees(asked, trees(), capture_sizes=SIZES, patches=("stale_trees",))).token_ids != expected.token_ids


@exhaustive
@pytest.mark.parametrize(
    ("broken", "refusal"),
    [("fleeting_trees", "has been given back"), ("options_from_the_host", "host")],
)
def test_what_a_gpu_would_not_capture_is_refused(bed: Bed, plain: tuple[Case, Answers], broken: str, refusal: str) -> None:
    with pytest.raises(Exception, match=refusal):
        bed.run(with_trees(plain[0], trees(), capture_sizes=SIZES, patches=(broken,)))


def recorded(work: Any) -> graphs.Graph:
    graph = graphs.Graph()
    with graphs.captured(graph):
        work()
    return graph


def test_a_replay_runs_what_was_captured_on_the_same_memory() -> None:
    given, found, times = torch.zeros(3), torch.zeros(3), [2]

    def work() -> None:
        doubled = torch.cat([given[:2] * times[0], given[2:]])
        found.copy_(doubled)
        found[1:] += 1

    graph = recorded(work)
    given.copy_(torch.tensor([1.0, 2.0, 3.0]))
    times[0] = 100  # Python is no part of a graph
    graph.replay()
    assert found.tolist() == [2.0, 5.0, 4.0]
    given.zero_()
    graph.replay()
    assert found.tolist() == [0.0, 1.0, 1.0]
    graphs.forget()


def test_what_a_graph_allocates_is_its_own() -> None:
    given, kept = torch.ones(2), []
    graph = recorded(lambda: kept.append(given + 1))
    given.fill_(7.0)
    graph.replay()
    assert kept[0].tolist() == [8.0, 8.0]
    graphs.forget()


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: bool(x[0]),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0]),
        lambda x: x.repeat_interleave(x.long()),
    ],
)
def test_what_waits_for_the_host_is_refused(work: Any) -> None:
    x = torch.ones(2)
    with pytest.raises(graphs.RefusedError, match="captured"):
        recorded(lambda: work(x))
    graphs.forget()


def test_memory_that_was_given_back_is_refused() -> None:
    out, fleeting = torch.zeros(2), [torch.ones(4)]
    graph = recorded(lambda: out.copy_(fleeting[0][2:]))
    graph.replay()
    fleeting.clear()
    with pytest.raises(graphs.RefusedError, match=r"\[\(2,\)\] has been given back"):
        graph.replay()
    graphs.forget()
