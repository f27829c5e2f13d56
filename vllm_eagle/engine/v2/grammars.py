"""Grammars along draft trees in vLLM's V2 runner: every node gets the bitmask of its path.

vLLM's scheduler has the grammars. For a batch with constrained requests its worker copies what was drafted to the host, and the
engine waits for that copy, and for the step's tokens, before it lets the next step sample: the forward pass over the drafts runs
meanwhile. Here parents travel in the same copy (`TreeTokens`), so that the scheduler can follow a tree (`mask_nodes`), and nothing
else is waited for.

Drafts are not filtered before they are verified: what the grammar allows next follows from tokens that the device has just
sampled, and to ask would be to wait for them. A forbidden node is never accepted instead, since the row of its parent, masked, does
not yield its token.
"""

from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.utils import DraftTokensHandler

from vllm_eagle.engine.v2.slots import SlotTrees

_NAME = "vllm_eagle_parents"  # an attribute of vLLM's DraftTokenIds, which goes to another process whole
NO_NODE = -1  # in the place of a parent: the tree has ended


class TreeTokens(DraftTokensHandler):
    """In place of vLLM's: the copy that it makes for constrained requests holds parents, too."""

    def __init__(self, device: torch.device, trees: SlotTrees):
        super().__init__(device)
        self._trees = trees

    def set_draft_tokens(self, input_batch: InputBatch, draft_tokens: torch.Tensor) -> None:
        """Of nodes 1..n [num_reqs, n] int64; beside them their parents, `NO_NODE` past a tree's last node."""
        number = draft_tokens.shape[1]
        if input_batch.has_structured_output_reqs:
            slots, nodes = input_batch.idx_mapping, torch.arange(1, number + 1, device=draft_tokens.device)
            parents = self._trees.parents[slots, 1 : number + 1]
            draft_tokens = torch.cat([draft_tokens, parents.where(nodes < self._trees.num_nodes[slots, None], NO_NODE)], 1)
        super().set_draft_tokens(input_batch, draft_tokens)
        self.num_draft_tokens = number

    def get_draft_tokens(self) -> DraftTokenIds | None:
        """As vLLM's, which waits where a request is constrained; then with parents (`parents_of`)."""
        found = super().get_draft_tokens()
        if found is not None and self.draft_tokens_np is not None:
            number, rows = self.num_draft_tokens, found.draft_token_ids
            found.draft_token_ids = [row[:number] for row in rows]
            found.__dict__[_NAME] = [row[number:] for row in rows]
        return found


def parents_of(drafts: Any) -> list[list[int]]:
    """Parents of nodes 1..n of each request's tree, in the order of `drafts.req_ids`; empty lists where they are not known."""
    return getattr(drafts, _NAME, [[]] * len(drafts.req_ids))


def mask_nodes(
    grammar: StructuredOutputGrammar,  # that has seen what was emitted; it is left so
    token_ids: list[int],  # of nodes 1..n, or of the first few of them
    parents: list[int],  # of the same nodes
    bitmask: torch.Tensor,  # [rows, vocab / 32] int32, filled with -1: everything is allowed
    row: int,  # of the root; node i has the i-th behind it
) -> int:
    """Fill the rows of a tree's nodes with what the grammar allows after them; returns how many nodes it forbids.

    Their rows, and those behind the grammar's end, are left as they are, which is what vLLM does behind the end.
    """
    children: list[list[int]] = [[] for _ in range(len(token_ids) + 1)]
    for node, parent in enumerate(parents[: len(token_ids)], 1):
        if parent != NO_NODE:
            children[parent].append(node)
    num_nodes = sum(map(len, children))
    visited = _descend(grammar, token_ids, children, bitmask, row, 0)
    return num_nodes - visited


def _descend(
    grammar: StructuredOutputGrammar, token_ids: list[int], children: list[list[int]], bitmask: torch.Tensor, row: int, node: int
) -> int:
    """The grammar stands behind `node`; returns how many nodes below are allowed."""
    if grammar.is_terminated():
        return 0
    grammar.fill_bitmask(bitmask, row + node)
    allowed: np.ndarray = bitmask[row + node].numpy()
    visited = 0
    for child in children[node]:
        token = token_ids[child - 1]
        if not (allowed[token // 32] >> (token % 32)) & 1 or not grammar.accept_tokens("", [token]):
            continue
        visited += 1 + _descend(grammar, token_ids, children, bitmask, row, child)
        grammar.rollback(1)
    return visited
