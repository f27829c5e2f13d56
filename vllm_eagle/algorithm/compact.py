"""Compact the KV cache: move the accepted path's keys and values to the slots that their positions own.

Node i was written to the slot of position context_len + i; accepted at depth d, it belongs at position context_len + d. Nodes are
ordered parents first, so i >= d and a move never goes up, but one move's target may be another's source: read all, then write.
What rejected nodes wrote lies beyond the committed tokens and is overwritten by the next step.
"""

from collections.abc import Sequence

import numpy as np

from vllm_eagle.algorithm.tree import IntArray


def moves(
    paths: Sequence[Sequence[int]],  # accepted nodes per request, root left out
    context_lens: Sequence[int],
) -> tuple[IntArray, IntArray, IntArray]:
    """Position moves of all requests: (index into paths, source position, target position), each [num_moves] int64."""
    plan = [
        (index, context_len + node, context_len + depth)
        for index, (path, context_len) in enumerate(zip(paths, context_lens, strict=True))
        for depth, node in enumerate(path, start=1)
        if node != depth
    ]
    columns = np.array(plan, dtype=np.int64).reshape(-1, 3)
    return columns[:, 0], columns[:, 1], columns[:, 2]


def slots(
    block_table: IntArray,  # [num_reqs, max_blocks] integer
    req_indices: IntArray,  # [num_tokens] int64
    positions: IntArray,  # [num_tokens] int64
    block_size: int,
) -> IntArray:  # [num_tokens] int64
    """Cache slots that positions of requests own."""
    return block_table[req_indices, positions // block_size].astype(np.int64) * block_size + positions % block_size
