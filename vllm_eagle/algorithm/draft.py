"""Grow draft trees: expand a level, rerank, keep the best nodes.

The head gives log-probabilities of the next token after the root; the best children become level 1, the most promising of them
are run through the head, their children become level 2, and so on. At the end the best nodes of all levels form the tree
(EAGLE-2, arXiv 2406.16858, section 4). A node's score is the sum of the log confidences on its path, so it never exceeds its
parent's and the best nodes always form a tree, whose every prefix in score order is a tree too.

Two things differ from EAGLE-2:
- Coupled drafting. A sampled token is `argmax(log p / T + noise)` with noise that is known before drafting. Ranking children by
  `log q / T` and the noise proposes what the target is about to sample; at T = 0 the noise is zero and this is plain EAGLE-2.
- Growth stops when no unexpanded node could still enter the tree, or another level would not pay: a small confident tree becomes
  a chain by itself and hopeless branches cost no head pass. With as many nodes as a chain, the tree contains the chain where that
  is best.

Static shapes (EAGLE-1) take the same path with fixed choices. Pure torch, no vLLM; batched over requests.

On a GPU the host must not wait for what was drafted. There levels are as many as requests allow and as wide as is said before them
(`Limits`), and the nodes of `grow_pool` are put in order on the device (ops/rerank.py). Where the widths suffice they are the same
trees: what is drafted needlessly does not enter them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from vllm_eagle import native
from vllm_eagle.algorithm.config import MAX_DRAFT_TOKENS, TreeConfig
from vllm_eagle.algorithm.shapes import StaticShape
from vllm_eagle.algorithm.tree import DraftTree

NEVER = float("-inf")
# A head averages over what it does not know, so its logits are flatter than the target's, and the noise must weigh less beside
# them. Measured with two heads: bench/README.md.
NOISE_WEIGHT = 0.85


@dataclass(frozen=True, slots=True)
class Level:
    """Nodes that the head runs next, `width` per request. Unused places hold copies; their results are ignored."""

    depth: int  # of these nodes; the root has depth 0
    token_ids: torch.Tensor  # [num_reqs, width] int64
    parent_rows: torch.Tensor  # [num_reqs, width] int64, place of the parent in the previous level (0 for the root)
    ancestors: torch.Tensor  # [num_reqs, width, rows] bool over the rows of all levels up to and including this one


@dataclass(frozen=True, slots=True)
class Request:
    """What growth must know of one request."""

    root_token_id: int
    num_draft_tokens: int  # most nodes besides the root; 0 drafts nothing
    temperature: float = 0.0  # 0 is greedy
    max_depth: int = MAX_DRAFT_TOKENS  # most levels; the engine's own limit holds, too
    topk: int = MAX_DRAFT_TOKENS  # most children per node, likewise; 1 drafts a chain


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What growth must know of all requests of a batch, on their device; and what bounds it, on the host."""

    budgets: torch.Tensor  # [num_reqs] int64, most nodes besides the root
    temperatures: torch.Tensor  # [num_reqs] float32, 0 is greedy
    max_depths: torch.Tensor  # [num_reqs] int64, most levels
    topks: torch.Tensor  # [num_reqs] int64, most children per node
    most_drafts: int  # at least the greatest budget
    depth_limit: int  # levels to grow

    @classmethod
    def of(cls, requests: list[Request], config: TreeConfig, device: torch.device) -> "Batch":
        """Nothing is waited for."""
        budgets = [min(r.num_draft_tokens, config.num_draft_tokens) for r in requests]
        return cls(
            _sent(budgets, device),
            _sent([float(r.temperature) for r in requests], device),  # users write 1, too
            _sent([r.max_depth for r in requests], device),
            _sent([r.topk for r in requests], device),
            max(budgets),
            min(config.depth_limit, max(r.max_depth for r in requests)),
        )


RunHead = Callable[[Level], torch.Tensor]  # -> logits [num_reqs, width, draft_vocab] after each node of the level
Pays = Callable[[np.ndarray], bool]  # scores [num_reqs, num_nodes] of the newest nodes that could be expanded -> whether to
NoiseAt = Callable[[int], torch.Tensor]  # depth of the drafted token -> noise [num_reqs, draft_vocab], zero for greedy requests


@dataclass(frozen=True, slots=True)
class Limits:
    """What ends the growth of dynamic trees early, where it could not pay."""

    node_floor: float = NEVER  # nodes with no higher score get no children
    pays: Pays | None = None  # whether to go on after a level; None: as long as nodes may enter a tree
    widths: Sequence[int] | None = None  # most nodes to expand per request at depth 1, 2, ...
    fixed_width: bool = False  # let what is drafted decide nothing, `pays` included: then nothing waits for a GPU


def grow(
    requests: list[Request],
    root_logits: torch.Tensor,  # [num_reqs, draft_vocab], the head's logits after the root
    run_head: RunHead,
    config: TreeConfig,
    noise_at: NoiseAt | None = None,  # None: uncoupled
    limits: Limits = Limits(),  # of dynamic trees
    token_ids: torch.Tensor | None = None,  # [draft_vocab] int64, the token of each logit; None: the target's own numbers
) -> list[DraftTree]:
    """Grow one tree per request. `run_head` is called once per level, at most `config.depth_limit - 1` times."""
    if not requests:
        return []
    batch = Batch.of(requests, config, root_logits.device)
    pool = grow_pool(batch, root_logits, run_head, config, noise_at, limits, token_ids)
    return pool.trees([r.root_token_id for r in requests])


def grow_pool(
    batch: Batch,
    root_logits: torch.Tensor,
    run_head: RunHead,
    config: TreeConfig,
    noise_at: NoiseAt | None,
    limits: Limits,
    token_ids: torch.Tensor | None = None,
) -> "Pool":
    """All drafted nodes. If the width is fixed nothing is read by the host, nor sent: that can be captured in a CUDA graph."""
    pool = Pool(batch, config)
    ranker = _Ranker(batch.temperatures, config.confidence_scale, noise_at is not None)
    frontier = _StaticFrontier(pool, config) if config.mode == "static" else _BestFrontier(pool, config.children, limits)
    logits = root_logits[:, None]
    for depth in range(1, batch.depth_limit + 1):
        confidences, tokens = ranker.children(logits, noise_at(depth) if noise_at else None, config.children)
        chosen = frontier.grow(depth, confidences, tokens if token_ids is None else token_ids[tokens])
        if chosen is None or depth == batch.depth_limit:
            break
        logits = run_head(pool.expand(depth, *chosen))
    return pool


def _sent(values: list[int] | list[float], device: torch.device) -> torch.Tensor:
    """On the device, which is not waited for."""
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


class _Ranker:
    """Order the children of a node and say how sure the head is of each."""

    def __init__(self, temperatures: torch.Tensor, confidence_scale: float, coupled: bool):
        # There is noise with coupling only, and zero for greedy requests.
        self._noise_factors = temperatures * (NOISE_WEIGHT / confidence_scale)
        # With the noise known, or none, the outcome is certain and only the head's error is left, which is one of its logits at any
        # temperature: the confidence is that of `log q + T * noise` and may be sharper than the probability. Without the noise, the
        # probability at this temperature is the acceptance.
        if coupled:
            self._factors = torch.full_like(temperatures, 1 / confidence_scale)
        else:
            self._factors = torch.where(temperatures > 0, 1 / temperatures, 1 / confidence_scale)

    def children(
        self,
        logits: torch.Tensor,  # [num_reqs, width, draft_vocab]
        noise: torch.Tensor | None,  # [num_reqs, draft_vocab]
        num_children: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log confidences and places in the draft vocabulary, both [num_reqs, width, num_children], best first."""
        scaled = None if noise is None else noise * self._noise_factors[:, None]
        if logits.device.type == "cpu" and native.runs():
            values, tokens = torch.ops.vllm_eagle.best_children(logits, self._factors, scaled, num_children)
            return values, tokens
        if logits.is_cuda:
            from vllm_eagle.ops.best_children import best_children  # Triton: not installed beside vLLM's CPU wheel

            return best_children(logits, self._factors, None if scaled is None else scaled.float(), num_children)
        ranking = logits.float() * self._factors[:, None, None]
        if scaled is not None:
            ranking = ranking + scaled[:, None]
        values, tokens = ranking.topk(min(num_children, ranking.shape[-1]), dim=-1)
        return values - ranking.logsumexp(-1, keepdim=True), tokens


class Pool:
    """All drafted nodes of all requests so far, level by level, without the roots."""

    def __init__(self, batch: Batch, config: TreeConfig):
        num_reqs, device = len(batch.budgets), batch.budgets.device
        self._config, self._most = config, batch.most_drafts
        self.budgets, self.max_depths, self._topks = batch.budgets, batch.max_depths, batch.topks
        self.tokens = torch.empty(num_reqs, 0, dtype=torch.long, device=device)
        self.scores = torch.empty(num_reqs, 0, device=device)
        self.parents = torch.empty(num_reqs, 0, dtype=torch.long, device=device)  # place in the pool, -1 is the root
        self.level_start = 0
        self.num_children = 0  # per expanded node, in the newest level
        # The rows that the head ran last: their place in the pool, score and ancestors. At first the root.
        self._row_nodes = torch.full((num_reqs, 1), -1, dtype=torch.long, device=device)
        self._row_scores = torch.zeros(num_reqs, 1, device=device)
        self._row_ancestors = torch.zeros(num_reqs, 1, 0, dtype=torch.bool, device=device)

    def add(self, tokens: torch.Tensor, confidences: torch.Tensor, allowed: torch.Tensor) -> None:
        """Add the children of the rows that ran last: tokens, log confidences and allowed, [num_reqs, width, children]."""
        num_reqs, _width, children = tokens.shape
        allowed = allowed & (torch.arange(children, device=tokens.device) < self._topks[:, None, None])
        scores = (self._row_scores[:, :, None] + confidences.clamp(max=0)).masked_fill(~allowed, NEVER)
        # A head that yields NaN drafts nothing there; the target's tokens do not depend on it.
        scores = scores.nan_to_num(nan=NEVER, neginf=NEVER)
        parents = self._row_nodes[:, :, None].expand(-1, -1, children)
        self.level_start = self.tokens.shape[1]
        self.tokens = torch.cat([self.tokens, tokens.reshape(num_reqs, -1)], 1)
        self.scores = torch.cat([self.scores, scores.reshape(num_reqs, -1)], 1)
        self.parents = torch.cat([self.parents, parents.reshape(num_reqs, -1)], 1)
        self.num_children = children

    def grow(
        self, depth: int, confidences: torch.Tensor, tokens: torch.Tensor, most: int, node_floor: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`add` and `_BestFrontier.hopeful` by one C++ operator."""
        self.level_start, self.num_children = self.tokens.shape[1], tokens.shape[2]
        self.scores, self.tokens, self.parents, places, hopeful = torch.ops.vllm_eagle.grow_level(
            confidences, tokens, self._row_nodes, self._row_scores, self.scores, self.tokens, self.parents,
            self.budgets, self.max_depths, self._topks, depth, most, node_floor,
        )  # fmt: skip
        return places, hopeful

    def expand(self, depth: int, places: torch.Tensor, scores: torch.Tensor) -> Level:
        """Make the nodes at `places` [num_reqs, width] of the newest level the rows that run next.

        Scores [num_reqs, width] are theirs; children of nodes with minus infinity enter no tree.
        """
        nodes = self.level_start + places
        parent_rows = places // self.num_children
        width = places.shape[1]
        inherited = self._row_ancestors.gather(1, parent_rows[:, :, None].expand(-1, -1, self._row_ancestors.shape[2]))
        itself = torch.eye(width, dtype=torch.bool, device=places.device).expand(places.shape[0], -1, -1)
        self._row_nodes = nodes
        self._row_scores = scores
        self._row_ancestors = torch.cat([inherited, itself], 2)
        return Level(depth, self.tokens.gather(1, nodes), parent_rows, self._row_ancestors)

    def nth_best(self) -> torch.Tensor:
        """Score that a new node must beat to enter its request's tree: [num_reqs]."""
        ranked = self.scores.topk(min(self._most, self.scores.shape[1]), dim=1).values
        padding = ranked.new_full((ranked.shape[0], 1), NEVER)
        last = (self.budgets - 1).clamp(min=0, max=ranked.shape[1])
        bound = torch.cat([ranked, padding], 1).gather(1, last[:, None])[:, 0]
        return bound.masked_fill(self.budgets == 0, float("inf"))

    def trees(self, root_token_ids: list[int]) -> list[DraftTree]:
        """Rerank: the best nodes of each request, parents first."""
        tokens, scores, parents = (x.cpu().numpy() for x in (self.tokens, self.scores, self.parents))
        # A stable sort keeps the parent, which entered the pool first, ahead of a child with an equal score.
        order = np.argsort(-scores, axis=1, kind="stable")
        ranks = np.empty_like(order)
        ranks[np.arange(len(order))[:, None], order] = np.arange(order.shape[1])
        counts = np.minimum((scores > NEVER).sum(1), self.budgets.numpy())
        trees = []
        for i, root in enumerate(root_token_ids):
            best = order[i, : counts[i]]
            above = parents[i, best]
            trees.append(
                DraftTree(
                    np.concatenate([[root], tokens[i, best]]),
                    np.concatenate([[0], np.where(above < 0, 0, ranks[i, above] + 1)]),
                    np.concatenate([np.zeros(1, np.float32), scores[i, best]]),
                )
            )
        return trees


Chosen = tuple[torch.Tensor, torch.Tensor]  # places in the newest level, and scores, of nodes to expand: [num_reqs, width]


class _BestFrontier:
    """Dynamic trees: expand the best nodes of the newest level that could still lead into the tree."""

    def __init__(self, pool: Pool, width: int, limits: Limits):
        self._pool, self._width, self._limits = pool, width, limits

    def grow(self, depth: int, confidences: torch.Tensor, tokens: torch.Tensor) -> Chosen | None:
        """Add children [num_reqs, width, children] of this depth to the pool; returns which of them to expand, if any."""
        limits = self._limits
        most = self._width if limits.widths is None else min(self._width, limits.widths[depth - 1])
        if tokens.device.type == "cpu" and native.runs() and not limits.fixed_width:
            places, hopeful = self._pool.grow(depth, confidences, tokens, most, limits.node_floor)
        else:
            self._pool.add(tokens, confidences, (self._pool.max_depths >= depth)[:, None, None])
            places, hopeful = self.hopeful(depth, most)
            if limits.fixed_width:
                return places, hopeful
            width = int((hopeful > NEVER).sum(1).max())
            places, hopeful = places[:, :width], hopeful[:, :width]
        if not places.shape[1] or (limits.pays is not None and not limits.pays(hopeful.cpu().numpy())):
            return None
        return places, hopeful

    def hopeful(self, depth: int, most: int) -> Chosen:
        """The best nodes of the newest level, best first; minus infinity where they may not be expanded."""
        newest = self._pool.scores[:, self._pool.level_start :]
        newest = newest.masked_fill((self._pool.max_depths <= depth)[:, None], NEVER)  # these have no children
        scores, places = newest.topk(min(most, newest.shape[1]), dim=1)
        hopeful = scores > self._pool.nth_best().clamp(min=self._limits.node_floor)[:, None]
        return places, scores.where(hopeful, NEVER)


class _StaticFrontier:
    """Fixed shapes: expand the nodes that have children in the shape."""

    def __init__(self, pool: Pool, config: TreeConfig):
        self._pool, self._shape = pool, config.shape

    def grow(self, depth: int, confidences: torch.Tensor, tokens: torch.Tensor) -> Chosen | None:
        """As _BestFrontier's."""
        in_shape, places = _static_level(self._shape, depth, confidences.shape[2], confidences.device)
        self._pool.add(tokens, confidences, in_shape.expand_as(confidences) & (self._pool.max_depths >= depth)[:, None, None])
        if not len(places):
            return None
        expanded = places.expand(len(tokens), -1)
        return expanded, self._pool.scores[:, self._pool.level_start :].gather(1, expanded)


@cache
def _static_level(shape: StaticShape, depth: int, num_children: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Which children of the rows before are in the shape [width, num_children], and the places of those with children [inner]."""
    rows, inner = shape.inner(depth - 1), shape.inner(depth)
    level = set(shape.level(depth))  # a vocabulary may be smaller than the shape's ranks
    in_shape = [[(*row, rank) in level for rank in range(num_children)] for row in rows]
    places = [rows.index(path[:-1]) * num_children + path[-1] for path in inner]
    return torch.tensor(in_shape, device=device), torch.tensor(places, dtype=torch.int64, device=device)
