"""Growth of trees against the twin that scores every path, and the promises that trees make."""

import math
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests.algorithm import reference
from vllm_eagle import native
from vllm_eagle.algorithm import draft
from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.algorithm.draft import NEVER, NOISE_WEIGHT, Batch, Level, Limits, Request, _Ranker, grow, grow_pool
from vllm_eagle.algorithm.noise import gumbel
from vllm_eagle.algorithm.shapes import StaticShape, best_static_shape
from vllm_eagle.algorithm.tree import DraftTree, inner_nodes

VOCAB = 4
Path = tuple[int, ...]


@pytest.fixture(scope="module", autouse=True, params=[True, False], ids=["native", "torch"])
def operators(request: pytest.FixtureRequest) -> Iterator[None]:
    """With our C++ operators, which are built here wherever a compiler is, and without them."""
    assert native.problem() is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "runs", lambda: request.param)
        yield


class TableHead:
    """A head whose logits after a path are a fixed random function of it, for several requests."""

    def __init__(self, num_reqs: int, seed: int, sharpness: float = 2.0):
        self.seed, self.sharpness = seed, sharpness
        self.rows: list[list[list[Path]]] = [[[()]] for _ in range(num_reqs)]
        self.num_rows = 0  # per request, run so far

    def logits(self, req: int, path: Path) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, req, path)) % 2**31)
        return torch.randn(VOCAB, generator=generator) * self.sharpness

    def root_logits(self) -> torch.Tensor:
        return torch.stack([self.logits(req, ()) for req in range(len(self.rows))])

    def __call__(self, level: Level) -> torch.Tensor:
        num_reqs, width = level.token_ids.shape
        assert level.ancestors.shape == (num_reqs, width, self.num_rows + width)
        out = torch.zeros(num_reqs, width, VOCAB)
        for req, levels in enumerate(self.rows):
            parents = [levels[-1][row] for row in level.parent_rows[req].tolist()]
            paths = [(*above, token) for above, token in zip(parents, level.token_ids[req].tolist(), strict=True)]
            levels.append(paths)
            ran_before = [path for earlier in levels[1:] for path in earlier]
            for i, path in enumerate(paths):
                assert len(path) == level.depth
                # A row sees itself and the rows that ran its ancestors. Rows may repeat a path only where they are unused.
                seen = {ran_before[row] for row in level.ancestors[req, i].nonzero()[:, 0].tolist()}
                assert seen == {path[:d] for d in range(1, len(path) + 1)}
                out[req, i] = self.logits(req, path)
        self.num_rows += width
        return out


def paths_of(tree: DraftTree) -> dict[Path, float]:
    """Token path and score of every node but the root."""
    return {tuple(tree.token_ids[tree.path(n)[1:]].tolist()): float(tree.scores[n]) for n in range(1, tree.num_nodes)}


@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.7, 1.0]),
    st.booleans(),
)
def test_dynamic_growth_keeps_the_best_paths_of_all(
    seed: int, num_draft_tokens: int, max_depth: int, temperature: float, coupled: bool
) -> None:
    """With topk as wide as the vocabulary nothing is cut off, and early stopping must not lose a node either."""
    config = TreeConfig(num_draft_tokens, topk=64, max_depth=max_depth, coupled=coupled)
    head = TableHead(2, seed)
    noise = gumbel(torch.arange(config.depth_limit) + seed, VOCAB)
    noise_at = (lambda d: noise[None, d - 1].expand(2, -1) * (temperature > 0)) if coupled else None
    requests = [Request(0, num_draft_tokens, temperature), Request(0, max(1, num_draft_tokens - 1), temperature)]
    trees = grow(requests, head.root_logits(), head, config, noise_at)
    factor = 1 / (config.confidence_scale if coupled or temperature == 0 else temperature)
    weight = NOISE_WEIGHT * temperature * factor if coupled else 0.0
    for req, tree in enumerate(trees):

        def confidences(path: Path, req: int = req) -> list[float]:
            return reference.log_confidences(head.logits(req, path).tolist(), factor, noise[len(path)].tolist(), weight)

        best = reference.best_dynamic_tree(confidences, VOCAB, requests[req].num_draft_tokens, config.depth_limit)
        found = paths_of(tree)
        assert sorted(found.values()) == pytest.approx(sorted(best.values()), abs=1e-4)
        for path, score in found.items():
            if path in best:  # equal scores may be exchanged
                assert score == pytest.approx(best[path], abs=1e-4)


@given(st.integers(0, 10**6), st.integers(1, 20), st.sampled_from([0.0, 1.0]), st.sets(st.integers(0, VOCAB - 1), min_size=2))
def test_a_draft_vocabulary_is_a_vocabulary_whose_other_tokens_are_impossible(
    seed: int, num_draft_tokens: int, temperature: float, chosen: set[int]
) -> None:
    config, token_ids = TreeConfig(num_draft_tokens, topk=4), torch.tensor(sorted(chosen))
    noise = gumbel(torch.arange(config.depth_limit) + seed, VOCAB) * (temperature > 0)
    few = gumbel(torch.arange(config.depth_limit) + seed, token_ids) * (temperature > 0)
    impossible = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, token_ids, False)
    requests, head, same_head = [Request(0, num_draft_tokens, temperature)], TableHead(1, seed), TableHead(1, seed)
    (whole,) = grow(
        requests,
        head.root_logits().masked_fill(impossible, float("-inf")),
        lambda level: head(level).masked_fill(impossible, float("-inf")),
        config,
        lambda depth: noise[None, depth - 1],
    )
    (found,) = grow(
        requests,
        same_head.root_logits()[:, token_ids],
        lambda level: same_head(level)[:, :, token_ids],
        config,
        lambda depth: few[None, depth - 1],
        token_ids=token_ids,
    )
    assert paths_of(found) == pytest.approx(paths_of(whole), abs=1e-5)


@given(st.integers(0, 10**6), st.integers(1, 30), st.sampled_from(["dynamic", "static", "chain"]))
def test_grown_trees_keep_their_promises(seed: int, num_draft_tokens: int, mode: str) -> None:
    config = TreeConfig(num_draft_tokens, mode=mode, topk=3)
    requests = [
        Request(9, num_draft_tokens),
        Request(9, 0),
        Request(9, num_draft_tokens, topk=1),
        Request(9, 1),
    ]
    head = TableHead(len(requests), seed)
    trees = grow(requests, head.root_logits(), head, config)
    assert [t.token_ids[0] for t in trees] == [9] * 4
    assert trees[1].num_nodes == 1
    assert trees[3].num_nodes == 2
    assert (trees[2].parents[1:] == range(trees[2].num_nodes - 1)).all()  # a chain
    for tree, request in zip(trees, requests, strict=True):
        assert tree.num_nodes <= request.num_draft_tokens + 1
        assert (tree.scores[1:] <= tree.scores[:-1] + 1e-6).all()  # the best nodes first: trimming keeps the best tree
        assert len(paths_of(tree)) == tree.num_nodes - 1  # siblings differ
        assert tree.depths.max() <= config.depth_limit


@pytest.mark.parametrize("floor", [-0.5, -1.5, -2.5])
def test_nodes_below_the_floor_get_no_children(floor: float) -> None:
    config = TreeConfig(num_draft_tokens=60, max_depth=3)
    trees = []
    for bound in (-math.inf, floor):
        head = TableHead(1, 5, 1.0)
        trees += grow([Request(7, 60)], head.root_logits(), head, config, limits=Limits(node_floor=bound))
    everything, few = trees
    kept = {path for path in paths_of(everything) if len(path) == 1 or parent_score(everything, path) > floor}
    assert paths_of(few).keys() >= kept
    assert all(len(path) == 1 or parent_score(few, path) > floor for path in paths_of(few))
    assert few.num_nodes < everything.num_nodes


def parent_score(tree: DraftTree, path: Path) -> float:
    """Score of the node above the one at the end of a path."""
    return paths_of(tree)[path[:-1]]


def test_growth_stops_where_it_is_told_not_to_pay() -> None:
    """It is asked after every level, with the scores of the nodes that could have children."""
    asked: list[np.ndarray] = []

    def pays(scores: np.ndarray) -> bool:
        asked.append(scores)
        return len(asked) < 3

    head = TableHead(2, 3, 1.0)
    trees = grow([Request(7, 20), Request(8, 0)], head.root_logits(), head, TreeConfig(16, max_depth=8), limits=Limits(pays=pays))
    assert [int(tree.depths.max()) for tree in trees] == [3, 0]
    assert len(asked) == 3
    best = max(score for path, score in paths_of(trees[0]).items() if len(path) == 3)
    assert asked[2][0, 0] == np.float32(best)
    assert np.isneginf(asked[2][1]).all()


@given(st.integers(0, 10**6), st.integers(1, 8), st.sampled_from([0.3, 1.0, 4.0]))
def test_a_tree_promises_at_least_what_a_chain_of_as_many_nodes_does(seed: int, num_draft_tokens: int, sharpness: float) -> None:
    """Expected accepted tokens by the scores: the chain is one of the trees that growth can choose."""
    promised = {}
    for mode in ("dynamic", "chain"):
        head = TableHead(1, seed, sharpness)
        config = TreeConfig(num_draft_tokens, mode=mode, max_depth=8, topk=4)
        tree = grow([Request(0, num_draft_tokens)], head.root_logits(), head, config)[0]
        promised[mode] = sum(math.exp(score) for score in tree.scores[1:])
    assert promised["dynamic"] >= promised["chain"] - 1e-5


def test_a_head_that_yields_nan_drafts_nothing_there() -> None:
    head = TableHead(2, 0)
    root_logits = head.root_logits()
    root_logits[0] = float("nan")
    trees = grow([Request(0, 6), Request(0, 6)], root_logits, head, TreeConfig(6, topk=3))
    assert [tree.num_nodes for tree in trees] == [1, 7]


def test_a_confident_head_gets_a_chain_and_few_rows() -> None:
    head = TableHead(1, 0, sharpness=200.0)
    tree = grow([Request(0, 6)], head.root_logits(), head, TreeConfig(6, topk=4))[0]
    assert tree.parents.tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert head.num_rows <= 4 * 5


def test_coupled_drafting_proposes_what_the_target_samples() -> None:
    """If the head's logits are the target's, but as flat as is expected of a head, the best child is the sampled token, always;
    without coupling only sometimes."""
    hits = {True: 0, False: 0}
    for seed in range(200):
        noise = gumbel(torch.tensor([seed]), VOCAB)
        head = TableHead(1, seed, 1.0)
        sampled = int((head.logits(0, ()) / NOISE_WEIGHT + noise[0]).argmax())
        for coupled in hits:
            tree = grow([Request(0, 1, 1.0)], head.root_logits(), head, TreeConfig(1), (lambda d, n=noise: n) if coupled else None)
            hits[coupled] += int(tree[0].token_ids[1]) == sampled
    assert hits[True] == 200
    assert 40 < hits[False] < 160


@given(st.integers(1, 60))
def test_best_static_shape_is_a_tree_of_the_worthiest_nodes(num_draft_tokens: int) -> None:
    rates = (0.7, 0.12, 0.05)
    shape = best_static_shape(num_draft_tokens, rates)
    assert len(shape) == num_draft_tokens
    worth = {path: math.prod(rates[rank] for rank in path) for path in shape.paths}
    least = min(worth.values())
    for path, value in worth.items():  # nothing that was left out is worth more than what was taken
        for outside in [(*path, 0), (*path[:-1], path[-1] + 1)]:
            if outside not in worth and outside[-1] < len(rates):
                assert math.prod(rates[rank] for rank in outside) <= least + 1e-12
        assert value > 0


def test_static_trees_have_the_given_shape() -> None:
    shape = StaticShape.from_paths([[0], [2], [0, 1], [2, 0], [2, 0, 0]])
    head = TableHead(1, 3)
    config = TreeConfig(5, mode="static", static_shape=shape)
    tree = grow([Request(0, 5)], head.root_logits(), head, config)[0]

    def rank(path: Path) -> int:
        return head.logits(0, path[:-1]).argsort(descending=True).tolist().index(path[-1])

    ranks = {tuple(rank(path[: d + 1]) for d in range(len(path))) for path in paths_of(tree)}
    assert ranks == set(shape.paths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_noise", [True, False])
@pytest.mark.parametrize(("vocab", "num_children"), [(4096, 8), (1000, 1), (70, 64), (3, 8)])
def test_native_children_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, with_noise: bool, vocab: int, num_children: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(3, 5, vocab, generator=generator)).to(dtype)
    logits[0, 1, ::2] = float("-inf")  # filtered
    logits[1, 2] = float("-inf")  # nothing is allowed
    logits[2, 3, 1] = float("nan")
    noise = torch.randn(3, vocab, generator=generator) if with_noise else None
    ranker = _Ranker(torch.tensor([0.0, 0.7, 1.5]), 0.8, with_noise)
    found = {}
    for runs in (True, False):
        monkeypatch.setattr(native, "runs", lambda runs=runs: runs)
        found[runs] = ranker.children(logits, noise, num_children)
    (values, tokens), expected = found[True], found[False][0]
    assert values.shape == expected.shape == (3, 5, min(num_children, vocab))
    hopeless = ~expected.isfinite()
    assert hopeless[1, 2].all()
    assert hopeless[2, 3].all()
    assert values.isfinite().equal(~hopeless)
    torch.testing.assert_close(values[~hopeless], expected[~hopeless], atol=2e-5, rtol=1e-5)
    # Tokens of equal logits may change places; each has the value that it is said to have.
    noises = torch.zeros(3, vocab) if noise is None else noise * ranker._noise_factors[:, None]
    ranking = (logits.float() * ranker._factors[:, None, None] + noises[:, None]).log_softmax(-1)
    torch.testing.assert_close(ranking.gather(-1, tokens)[~hopeless], values[~hopeless], atol=2e-5, rtol=1e-5)
    for row, hopeless_row in zip(tokens.flatten(0, 1), hopeless.flatten(0, 1), strict=True):
        likely = row[~hopeless_row].tolist()
        assert len(set(likely)) == len(likely)


# ---- on a GPU, where the host must not wait


@given(st.integers(0, 10**6), st.integers(1, 30), st.sampled_from([NEVER, -1.5]), st.sampled_from(["dynamic", "static", "chain"]))
def test_levels_of_fixed_width_make_the_same_trees(seed: int, num_draft_tokens: int, node_floor: float, mode: str) -> None:
    """What is drafted needlessly enters no tree."""
    config = TreeConfig(num_draft_tokens, mode=mode, topk=3)
    requests = [Request(9, num_draft_tokens), Request(9, 0), Request(9, num_draft_tokens, topk=1), Request(9, 5, max_depth=2)]
    heads = [TableHead(len(requests), seed) for _ in range(2)]
    asked, blind = (
        grow(requests, head.root_logits(), head, config, limits=Limits(node_floor, fixed_width=fixed))
        for head, fixed in zip(heads, (False, True), strict=True)
    )
    for one, other in zip(asked, blind, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.parents.tolist() == other.parents.tolist()
        np.testing.assert_allclose(one.scores, other.scores)


def test_widths_limit_what_is_expanded() -> None:
    config = TreeConfig(30, topk=3, max_depth=4)
    heads = [TableHead(1, 0) for _ in range(2)]
    for head, widths in zip(heads, ([3, 3, 3, 3], [1, 2, 1, 1]), strict=True):
        (tree,) = grow([Request(9, 30)], head.root_logits(), head, config, limits=Limits(widths=widths, fixed_width=True))
        assert [len(level) for level in head.rows[0][1:]] == widths[:3]
        assert (inner_nodes(tree.parents[None], tree.depths[None], np.array([tree.num_nodes]), 4) <= widths).all()


@pytest.mark.parametrize("mode", ["dynamic", "static", "chain"])
def test_growth_of_fixed_width_reads_nothing_that_was_drafted(mode: str) -> None:
    """Fake tensors have no values: whatever the host asks for raises."""
    config, requests = TreeConfig(16, mode=mode), [Request(9, 16), Request(9, 5, topk=2)]
    limits = Limits(node_floor=-1.0, fixed_width=True)
    noise = torch.zeros(2, VOCAB)
    # The C++ operators run on CPU tensors alone, as the choice of children on a GPU is a kernel.
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr(native, "runs", lambda: False)
        patch.setattr(draft, "_static_level", draft._static_level.__wrapped__)  # or it would keep fake tensors for others
        logits = torch.zeros(2, VOCAB)

        def head(level: Level) -> torch.Tensor:
            return torch.zeros(*level.token_ids.shape, VOCAB)

        batch = Batch.of(requests, config, logits.device)
        pool = grow_pool(batch, logits, head, config, lambda depth: noise, limits)
        assert pool.tokens.shape[1] > 2
        if mode == "dynamic":
            with pytest.raises(DataDependentOutputException):
                grow_pool(batch, logits, head, config, None, replace(limits, fixed_width=False))


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton: pip install --no-deps -r vllm_eagle/locks/interop.lock")
@pytest.mark.parametrize("seed", range(20))
def test_trees_put_in_order_on_a_device_are_those_of_the_host(seed: int) -> None:
    from vllm_eagle.ops import rerank

    config = TreeConfig(12, topk=3, max_depth=4)
    requests, head = [Request(9, 12), Request(8, 0), Request(7, 4)], TableHead(3, seed)
    batch, roots = Batch.of(requests, config, torch.device("cpu")), [r.root_token_id for r in requests]
    pool = grow_pool(batch, head.root_logits(), head, config, None, Limits(-1.0, fixed_width=True))
    found = rerank.reference(torch.tensor(roots), pool.tokens, pool.scores, pool.parents, pool.budgets, 13, 4)
    for row, tree in enumerate(pool.trees(roots)):
        own = slice(int(found.num_nodes[row]))
        assert tree.token_ids.tolist() == found.token_ids[row, own].tolist()
        assert tree.parents.tolist() == found.parents[row, own].tolist()
        np.testing.assert_array_equal(tree.scores, found.scores[row, own].numpy())


def test_nobody_drafts() -> None:
    head = TableHead(0, 0)
    assert grow([], torch.zeros(0, VOCAB), head, TreeConfig(4)) == []


def test_temperatures_may_be_whole_numbers() -> None:
    batch = Batch.of([Request(0, 4, 1), Request(0, 4, 0)], TreeConfig(4), torch.device("cpu"))
    assert batch.temperatures.dtype == torch.float32
