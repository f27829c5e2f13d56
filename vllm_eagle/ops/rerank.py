"""Draft trees out of all drafted nodes, on a GPU: the best nodes of each request, their parents, depths and ancestors.

Two launches: every drafted node counts how many are better, which is its place in the order; then every node of the tree climbs to
the root. What this is for: vllm_eagle/algorithm/draft.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_TILE = 128


@dataclass(frozen=True, slots=True, eq=False)
class Trees:
    """The trees of a batch on the GPU. Places past a tree's last node hold 0; such nodes hang under the root and see it alone."""

    token_ids: torch.Tensor  # [num_reqs, max_nodes] int64, node 0 is the root
    parents: torch.Tensor  # [num_reqs, max_nodes] int64
    scores: torch.Tensor  # [num_reqs, max_nodes] float32
    num_nodes: torch.Tensor  # [num_reqs] int64, root included
    depths: torch.Tensor  # [num_reqs, max_nodes] int64
    ancestors: torch.Tensor  # [num_reqs, max_nodes, max_nodes] bool


# Not specialized on how much was drafted, which changes from step to step: that would compile while requests wait.
@triton.jit(do_not_specialize=["drafted"])
def _order(
    tokens, scores, parents, budgets, tree_tokens, tree_scores, tree_parents, ranks, num_nodes, drafted, tree_row,
    TILE: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    base = request.to(tl.int64) * drafted
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_node = place < drafted
    score = tl.load(scores + base + place, mask=is_node, other=float("-inf"))
    rank = tl.zeros([TILE], tl.int32)
    hopeful = 0
    for start in range(0, drafted, TILE):
        other = start + tl.arange(0, TILE)
        its = tl.load(scores + base + other, mask=other < drafted, other=float("-inf"))
        # Of equals the one that was drafted first: a parent comes before its child.
        better = (its[None, :] > score[:, None]) | ((its[None, :] == score[:, None]) & (other[None, :] < place[:, None]))
        rank += tl.sum((better & (other < drafted)[None, :]).to(tl.int32), 1)
        hopeful += tl.sum((its > float("-inf")).to(tl.int32), 0)
    count = tl.minimum(hopeful, tl.load(budgets + request).to(tl.int32))
    tl.store(ranks + base + place, rank, mask=is_node)
    kept = is_node & (rank < count)
    out = request * tree_row + 1 + rank
    tl.store(tree_tokens + out, tl.load(tokens + base + place, mask=kept, other=0), mask=kept)
    tl.store(tree_scores + out, score, mask=kept)
    tl.store(tree_parents + out, tl.load(parents + base + place, mask=kept, other=-1), mask=kept)  # still places among all
    if tl.program_id(1) == 0:
        tl.store(num_nodes + request, (count + 1).to(tl.int64))


@triton.jit(do_not_specialize=["drafted"])
def _climb(ranks, parents, num_nodes, depths, ancestors, drafted, tree_row, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    request = tl.program_id(0)
    node = tl.arange(0, BLOCK)
    row = node + request * tree_row
    is_node = (node > 0) & (node < tl.load(num_nodes + request))
    above = tl.load(parents + row, mask=is_node, other=-1)
    rank = tl.load(ranks + request.to(tl.int64) * drafted + above, mask=is_node & (above >= 0), other=-1)
    parent = rank.to(tl.int64) + 1
    tl.store(parents + row, parent, mask=node < tree_row)
    tl.debug_barrier()  # what other threads stored is read below
    mask = ancestors + row * tree_row
    tl.store(mask + node, 1, mask=node < tree_row)
    tl.store(mask, 1, mask=node < tree_row)  # all see the root
    depth = (node > 0).to(tl.int64)
    for _ in range(DEPTH - 1):
        tl.store(mask + parent, 1, mask=is_node)
        depth += (parent > 0).to(tl.int64)
        parent = tl.load(parents + request * tree_row + parent, mask=is_node & (parent > 0), other=0)
    tl.store(depths + row, depth, mask=node < tree_row)


def rerank(
    root_token_ids: torch.Tensor,  # [num_reqs] int64
    tokens: torch.Tensor,  # [num_reqs, drafted] int64, parents first
    scores: torch.Tensor,  # [num_reqs, drafted] float32, minus infinity: no node
    parents: torch.Tensor,  # [num_reqs, drafted] int64, places among the drafted nodes, -1 is the root
    budgets: torch.Tensor,  # [num_reqs] int64, most nodes besides the root
    max_nodes: int,  # of any tree, root included
    max_depth: int,
) -> Trees:
    """The best nodes by score, of equals the first; equals `reference`."""
    num_reqs, drafted = tokens.shape
    trees = Trees(
        token_ids=tokens.new_zeros(num_reqs, max_nodes, dtype=torch.int64),
        parents=tokens.new_zeros(num_reqs, max_nodes, dtype=torch.int64),
        scores=tokens.new_zeros(num_reqs, max_nodes, dtype=torch.float32),
        num_nodes=tokens.new_empty(num_reqs, dtype=torch.int64),
        depths=tokens.new_empty(num_reqs, max_nodes, dtype=torch.int64),
        ancestors=tokens.new_zeros(num_reqs, max_nodes, max_nodes, dtype=torch.bool),
    )
    trees.token_ids[:, 0] = root_token_ids
    ranks = tokens.new_empty(num_reqs, drafted, dtype=torch.int32)
    if num_reqs == 0:
        return trees
    _order[(num_reqs, max(1, triton.cdiv(drafted, _TILE)))](
        tokens, scores, parents, budgets.clamp(max=max_nodes - 1), trees.token_ids, trees.scores, trees.parents, ranks,
        trees.num_nodes, drafted, max_nodes, TILE=_TILE,
    )  # fmt: skip
    _climb[(num_reqs,)](
        ranks, trees.parents, trees.num_nodes, trees.depths, trees.ancestors.view(torch.uint8), drafted, max_nodes,
        DEPTH=max_depth, BLOCK=triton.next_power_of_2(max_nodes), num_warps=4,
    )  # fmt: skip
    return trees


def reference(
    root_token_ids: torch.Tensor,
    tokens: torch.Tensor,
    scores: torch.Tensor,
    parents: torch.Tensor,
    budgets: torch.Tensor,
    max_nodes: int,
    max_depth: int,
) -> Trees:
    """The same, request by request."""
    num_reqs = len(tokens)
    tree_tokens, tree_parents = (torch.zeros(num_reqs, max_nodes, dtype=torch.int64) for _ in range(2))
    tree_scores, num_nodes = torch.zeros(num_reqs, max_nodes), torch.zeros(num_reqs, dtype=torch.int64)
    depths, ancestors = (
        torch.zeros(num_reqs, max_nodes, dtype=torch.int64),
        torch.eye(max_nodes, dtype=torch.bool).repeat(num_reqs, 1, 1),
    )
    for request in range(num_reqs):
        budget = min(int(budgets[request]), max_nodes - 1)
        order = scores[request].sort(descending=True, stable=True).indices.tolist()
        kept = [place for place in order if scores[request, place] > float("-inf")][:budget]
        node_of = {place: node for node, place in enumerate(kept, start=1)} | {-1: 0}
        tree_tokens[request, 0] = root_token_ids[request]
        for place, node in node_of.items():
            if node:
                tree_tokens[request, node] = tokens[request, place]
                tree_scores[request, node] = scores[request, place]
                tree_parents[request, node] = node_of[int(parents[request, place])]
        num_nodes[request] = 1 + len(kept)
        for node in range(1, max_nodes):  # parents come first
            above = int(tree_parents[request, node])
            depths[request, node] = depths[request, above] + 1
            ancestors[request, node] |= ancestors[request, above]
    return Trees(tree_tokens, tree_parents, tree_scores, num_nodes, depths, ancestors)
