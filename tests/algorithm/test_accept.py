"""Acceptance: the walk against its twin, the distribution by exact enumeration and by chi-square."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from tests.algorithm import reference
from tests.algorithm.test_tree import parent_lists
from vllm_eagle.algorithm.accept import accept
from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.algorithm.draft import Request, grow
from vllm_eagle.algorithm.noise import gumbel
from vllm_eagle.algorithm.shapes import StaticShape
from vllm_eagle.algorithm.tree import DraftTree


@st.composite
def trees_with_samples(draw: st.DrawFn) -> tuple[DraftTree, list[int]]:
    parents = draw(parent_lists(12))
    tokens = [0]
    for node in range(1, len(parents)):
        siblings = {tokens[n] for n in range(1, node) if parents[n] == parents[node]}
        tokens.append(draw(st.integers(0, 15).filter(lambda t, taken=siblings: t not in taken)))
    tree = DraftTree(np.array(tokens), np.array(parents), np.zeros(len(parents), dtype=np.float32))
    return tree, [draw(st.integers(0, 4)) for _ in parents]


@given(trees_with_samples())
def test_walk_equals_trying_every_node(case: tuple[DraftTree, list[int]]) -> None:
    tree, target_ids = case
    walk = accept(tree, target_ids)
    assert walk.path == reference.accepted_path(tree.token_ids.tolist(), tree.parents.tolist(), target_ids)
    assert walk.token_ids == [target_ids[node] for node in [0, *walk.path]]


VOCAB = 4


class ToyModels:
    """A target and a head that disagree, as tables of logits over paths of tokens."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        paths = [path for depth in range(4) for path in product(range(VOCAB), repeat=depth)]
        self.target = {path: torch.randn(VOCAB, generator=generator) * 1.5 for path in paths}
        self.head = {path: logits + torch.randn(VOCAB, generator=generator) for path, logits in self.target.items()}

    def draft(self, config: TreeConfig, noise: torch.Tensor | None) -> DraftTree:
        """Grow one tree; noise [depth, vocab]."""
        paths: list[list[tuple[int, ...]]] = [[()]]

        def run_head(level):
            parents = [paths[-1][row] for row in level.parent_rows[0].tolist()]
            paths.append([(*above, token) for above, token in zip(parents, level.token_ids[0].tolist(), strict=True)])
            return torch.stack([self.head[path] for path in paths[-1]])[None]

        noise_at = None if noise is None else (lambda depth: noise[None, depth - 1])
        return grow([Request(0, config.num_draft_tokens, 1.0)], self.head[()][None], run_head, config, noise_at)[0]

    def sample(self, tree: DraftTree, noise: torch.Tensor) -> list[int]:
        """What the target samples after every node: argmax(logits + noise of the position)."""
        tokens = [tuple(tree.token_ids[tree.path(node)[1:]].tolist()) for node in range(tree.num_nodes)]
        return [int((self.target[path] + noise[len(path)]).argmax()) for path in tokens]


CONFIGS = [
    TreeConfig(num_draft_tokens=5, topk=3, max_depth=2),
    TreeConfig(num_draft_tokens=5, topk=3, max_depth=2, coupled=False),
    TreeConfig(num_draft_tokens=6, mode="static", static_shape=StaticShape.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0]])),
    TreeConfig(num_draft_tokens=2, mode="chain"),
]
NAMES = ["coupled", "uncoupled", "static", "chain"]


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_emitted_tokens_equal_plain_decoding_with_the_same_noise(config: TreeConfig) -> None:
    models = ToyModels(0)
    for seed in range(300):
        noise = gumbel(torch.arange(3) + 3 * seed, VOCAB)
        tree = models.draft(config, noise if config.coupled else None).prefix(1 + seed % 8)
        emitted = accept(tree, models.sample(tree, noise)).token_ids
        path: tuple[int, ...] = ()
        for position in range(len(emitted)):
            path = (*path, int((models.target[path] + noise[position]).argmax()))
        assert tuple(emitted) == path


def step_frequencies(config: TreeConfig, num_steps: int, models: ToyModels, reuse_noise: bool = False) -> list[dict]:
    """How often each token was emitted after each path, per depth, over many steps with fresh noise."""
    counts: list[dict[tuple[int, ...], np.ndarray]] = [{} for _ in range(3)]
    seeds = torch.randint(0, 2**31, (num_steps, 3), generator=torch.Generator().manual_seed(1))
    for row in gumbel(seeds, VOCAB):
        noise = row[[0, 0, 0]] if reuse_noise else row
        tree = models.draft(config, noise if config.coupled else None)
        emitted = accept(tree, models.sample(tree, noise)).token_ids
        for depth, token in enumerate(emitted[:3]):
            counts[depth].setdefault(tuple(emitted[:depth]), np.zeros(VOCAB))[token] += 1
    return counts


def worst_p_value(models: ToyModels, counts: list[dict]) -> float:
    """Of the chi-square tests at every path that was seen often, corrected for their number."""
    p_values = []
    for per_path in counts:
        for path, seen in per_path.items():
            expected = models.target[path].softmax(-1).numpy().astype(np.float64) * seen.sum()
            if expected.min() >= 5:
                p_values.append(chisquare(seen, expected * seen.sum() / expected.sum()).pvalue)
    return min(p_values) * len(p_values)


@pytest.mark.parametrize("config", CONFIGS[1:], ids=NAMES[1:])
def test_each_depth_follows_the_target_distribution(config: TreeConfig) -> None:
    """Chi-square per depth and path. Independent drafts leave the law of every emitted token untouched."""
    models = ToyModels(2)
    assert worst_p_value(models, step_frequencies(config, 3000, models)) > 1e-3


def test_reused_noise_is_caught_by_the_chi_square() -> None:
    models = ToyModels(2)
    assert worst_p_value(models, step_frequencies(CONFIGS[1], 3000, models, reuse_noise=True)) < 1e-6


def completed(models: ToyModels, config: TreeConfig, noise: torch.Tensor) -> tuple[int, ...]:
    """Three tokens: one tree step, and plain decoding with the unused noise for what it left open."""
    tree = models.draft(config, noise if config.coupled else None)
    emitted = tuple(accept(tree, models.sample(tree, noise)).token_ids[:3])
    while len(emitted) < 3:
        emitted += (int((models.target[emitted] + noise[len(emitted)]).argmax()),)
    return emitted


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_whole_step_follows_the_target_distribution(config: TreeConfig) -> None:
    """All 64 sequences of three tokens against their exact probabilities, coupled drafting included.

    A coupled step emits more tokens when the noise is friendly, so what it emits is only fair together with the positions
    that it leaves open: their noise stays unused, as the generator does.
    """
    models = ToyModels(3)
    exact = {}
    for path in product(range(VOCAB), repeat=3):
        exact[path] = math.prod(models.target[path[:d]].softmax(-1)[path[d]].item() for d in range(3))
    num_steps = 6000
    seeds = torch.randint(0, 2**31, (num_steps, 3), generator=torch.Generator().manual_seed(4))
    counts = dict.fromkeys(exact, 0)
    for noise in gumbel(seeds, VOCAB):
        counts[completed(models, config, noise)] += 1
    likely = [path for path in exact if exact[path] * num_steps >= 5]
    observed = [counts[path] for path in likely] + [sum(counts[path] for path in exact if path not in likely)]
    expected = np.array([exact[path] for path in likely] + [sum(exact[path] for path in exact if path not in likely)])
    assert chisquare(observed, expected / expected.sum() * num_steps).pvalue > 1e-3


def test_exact_enumeration_of_a_step() -> None:
    """No sampling error at all: sum the probabilities of every outcome of the samples after every node.

    With one independent sample per depth (all nodes of a depth share a position's noise), the probability that a walk emits a
    given sequence must be the target's probability of it.
    """
    models = ToyModels(5)
    tree = models.draft(CONFIGS[1], None)
    tokens = [tuple(tree.token_ids[tree.path(node)[1:]].tolist()) for node in range(tree.num_nodes)]
    emitted: dict[tuple[int, ...], float] = {}
    # Only the sample at a visited node matters, and each is drawn from the target's distribution there.
    for outcome in product(range(VOCAB), repeat=tree.num_nodes):
        walk = accept(tree, outcome)
        visited = [0, *walk.path]
        if any(outcome[node] != 0 for node in range(tree.num_nodes) if node not in visited):
            continue  # one representative per outcome of the visited nodes
        probability = math.prod(models.target[tokens[n]].softmax(-1)[outcome[n]].item() for n in visited)
        emitted[tuple(walk.token_ids)] = emitted.get(tuple(walk.token_ids), 0.0) + probability
    assert sum(emitted.values()) == pytest.approx(1)
    for sequence, probability in emitted.items():
        exact = math.prod(models.target[sequence[:d]].softmax(-1)[token].item() for d, token in enumerate(sequence))
        assert probability == pytest.approx(exact)
