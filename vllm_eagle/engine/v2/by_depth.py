"""The walk where sampling parameters depend on the path to a node: penalties, bad words, custom processors, thinking budgets.

vLLM's kernels take a request's rows for a chain of drafted tokens. So at each depth they are shown the path so far as what it is, a
chain, and the last row of it is sampled. One call per depth more, and still nothing is waited for.
"""

import torch
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_eagle.engine.v2.rows import NodeRows, Walked, draw


def walk_by_depth(
    sampler: Sampler, part: NodeRows, max_depth: int, keeps_logits: bool
) -> tuple[Walked, torch.Tensor | None]:  # ..., [num_reqs * (max_depth + 1), vocab] or None
    """As ops/walk.py; besides, where asked for, the logits that tokens along the paths were drawn from."""
    device, num_reqs = part.logits.device, len(part.slots)
    places = torch.arange(part.token_ids.shape[1], device=device)
    is_node = (places < part.num_nodes[:, None]) & (places > 0)
    paths = torch.zeros(num_reqs, max_depth, dtype=torch.int32, device=device)
    emitted = torch.full((num_reqs, max_depth + 1), -1, dtype=torch.int64, device=device)
    lengths = torch.zeros(num_reqs, dtype=torch.int32, device=device)
    node, going = torch.zeros(num_reqs, dtype=torch.int64, device=device), torch.ones(num_reqs, dtype=torch.bool, device=device)
    chain, kept = [part.first_rows], []
    for depth in range(max_depth + 1):
        rows = torch.stack(chain, 1).flatten()
        slots = part.slots.repeat_interleave(depth + 1, output_size=len(rows))
        place_in_chain = torch.arange(depth + 1, dtype=torch.int32, device=device).repeat(num_reqs)
        last = slice(depth, None, depth + 1)
        token, processed = draw(
            sampler, part.logits[rows], part, slots, place_in_chain, part.positions[rows], part.input_ids[rows], last
        )  # fmt: skip
        if keeps_logits:
            kept.append(processed)
        emitted[:, depth] = torch.where(going, token, -1)
        if depth == max_depth:
            break
        matches = is_node & (part.parents == node[:, None]) & (part.token_ids == token[:, None])
        child = (matches * places).amax(1)
        going = going & (child > 0)
        node = torch.where(going, child, node)
        paths[:, depth] = torch.where(going, child, 0).int()
        lengths += going
        chain.append(part.first_rows + node)
    return (paths, emitted, lengths), torch.stack(kept, 1).flatten(0, 1) if keeps_logits else None
