"""Walk draft trees on a GPU along the tokens that the target sampled: the path and the emitted tokens, nothing waits for the host.

The rule, and why it is lossless: vllm_eagle/algorithm/accept.py. One program per request.
"""

import torch
import triton
import triton.language as tl

PADDING = -1


@triton.jit
def _walk(
    token_ids, parents, num_nodes, target_ids, paths, emitted, lengths, tree_row, path_row, emitted_row,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    is_node = place < tl.load(num_nodes + request)
    token = tl.load(token_ids + request * tree_row + place, mask=is_node, other=-1)
    parent = tl.load(parents + request * tree_row + place, mask=is_node, other=-1)
    node, length, going = 0, 0, 1
    for depth in range(DEPTH + 1):
        target = tl.load(target_ids + request * tree_row + node)
        tl.store(emitted + request * emitted_row + depth, tl.where(going == 1, target, -1))
        child = tl.max(tl.where((place > 0) & is_node & (parent == node) & (token == target), place, 0), 0)
        going = tl.where(child > 0, going, 0)
        node, length = tl.where(going == 1, child, node), length + going
        if depth < DEPTH:
            tl.store(paths + request * path_row + depth, tl.where(going == 1, child, 0))
    tl.store(lengths + request, length)


def walk(
    token_ids: torch.Tensor,  # [num_reqs, max_nodes] int64, node 0 is the root
    parents: torch.Tensor,  # [num_reqs, max_nodes] int64
    num_nodes: torch.Tensor,  # [num_reqs] int64, root included
    target_ids: torch.Tensor,  # [num_reqs, max_nodes] int64, sampled after each node
    max_depth: int,  # of any tree
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Accepted nodes [num_reqs, max_depth] int32, then zeros; emitted tokens [num_reqs, max_depth + 1] int64, then -1; how many
    nodes were accepted [num_reqs] int32. Equals `reference`.
    """
    num_reqs, max_nodes = token_ids.shape
    paths = token_ids.new_empty(num_reqs, max_depth, dtype=torch.int32)
    emitted = token_ids.new_empty(num_reqs, max_depth + 1, dtype=torch.int64)
    lengths = token_ids.new_empty(num_reqs, dtype=torch.int32)
    if not token_ids.stride() == parents.stride() == target_ids.stride():
        raise ValueError(f"one layout expected: {token_ids.stride()}, {parents.stride()}, {target_ids.stride()}")
    if num_reqs:
        _walk[(num_reqs,)](
            token_ids, parents, num_nodes, target_ids, paths, emitted, lengths,
            token_ids.stride(0), paths.stride(0), emitted.stride(0),
            DEPTH=max_depth, BLOCK=triton.next_power_of_2(max_nodes), num_warps=1,
        )  # fmt: skip
    return paths, emitted, lengths


def reference(
    token_ids: torch.Tensor, parents: torch.Tensor, num_nodes: torch.Tensor, target_ids: torch.Tensor, max_depth: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same, node by node."""
    paths = torch.zeros(len(token_ids), max_depth, dtype=torch.int32)
    emitted = torch.full((len(token_ids), max_depth + 1), PADDING)
    lengths = torch.zeros(len(token_ids), dtype=torch.int32)
    for request, count in enumerate(num_nodes.tolist()):
        node = 0
        for depth in range(max_depth + 1):
            emitted[request, depth] = target = int(target_ids[request, node])
            children = [i for i in range(1, count) if int(parents[request, i]) == node and int(token_ids[request, i]) == target]
            if not children:
                break
            node = children[0]
            paths[request, depth] = node
            lengths[request] = depth + 1
    return paths, emitted, lengths
