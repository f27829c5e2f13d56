"""Slow, obvious twins of the algorithm, one request at a time, with plain Python."""

import math
from collections.abc import Callable, Sequence
from itertools import product

Path = tuple[int, ...]  # tokens from the root's child to a node


def depth_of(parents: Sequence[int], node: int) -> int:
    """Edges from the root."""
    return 0 if node == 0 else 1 + depth_of(parents, parents[node])


def is_ancestor(parents: Sequence[int], node: int, above: int) -> bool:
    """Whether `above` is `node` or above it."""
    return node == above or (node != 0 and is_ancestor(parents, parents[node], above))


def accepted_path(token_ids: Sequence[int], parents: Sequence[int], target_ids: Sequence[int]) -> list[int]:
    """Try every node: accepted if each node on its path carries what was sampled after its parent. The deepest wins."""

    def accepted(node: int) -> bool:
        return node == 0 or (token_ids[node] == target_ids[parents[node]] and accepted(parents[node]))

    deepest = max((node for node in range(len(token_ids)) if accepted(node)), key=lambda n: depth_of(parents, n))
    path = []
    while deepest != 0:
        path.insert(0, deepest)
        deepest = parents[deepest]
    return path


def compacted(cache: Sequence[object], context_len: int, path: Sequence[int]) -> list[object]:
    """What the first slots must hold after compaction: context, root, then the accepted nodes in order."""
    return [*cache[: context_len + 1], *(cache[context_len + node] for node in path)]


def log_confidences(logits: Sequence[float], factor: float, noise: Sequence[float], weight: float) -> list[float]:
    """log softmax of factor * log softmax(logits) + weight * noise."""
    total = math.log(sum(math.exp(x) for x in logits))
    ranking = [factor * (x - total) + weight * g for x, g in zip(logits, noise, strict=True)]
    top = max(ranking)
    norm = top + math.log(sum(math.exp(x - top) for x in ranking))
    return [x - norm for x in ranking]


def best_dynamic_tree(
    confidences: Callable[[Path], Sequence[float]],  # log confidence of every next token after a path
    vocab: int,
    num_draft_tokens: int,
    max_depth: int,
) -> dict[Path, float]:
    """Score all paths up to max_depth and keep the best: what growth finds if no level is cut off by topk."""
    scores: dict[Path, float] = {}
    for depth in range(1, max_depth + 1):
        for path in product(range(vocab), repeat=depth):
            above = scores[path[:-1]] if depth > 1 else 0.0
            scores[path] = above + confidences(path[:-1])[path[-1]]
    ranked = sorted(scores, key=lambda path: (-scores[path], len(path)))
    return {path: scores[path] for path in ranked[:num_draft_tokens]}


def gumbel(seed: int, token: int) -> float:
    """vLLM's CPU noise of one token: SplitMix64 of (seed, token), with Python's unbounded integers."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    bits = mix((mix(seed) + (token + 1) * 0x9E3779B97F4A7C15) & mask) >> 11
    return -math.log(-math.log((bits + 0.5) / 2**53))
