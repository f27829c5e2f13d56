"""The draft trees of all requests on the device, by the slot that vLLM's V2 runner gives a request."""

import torch

from vllm_eagle.ops.rerank import Trees


class SlotTrees:
    """Written after drafting, read by the next step. Node 0 is the root, the last emitted token.

    Places past a tree's last node hold valid tokens, hang under the root and are counted out by `num_nodes`.
    """

    def __init__(self, num_slots: int, max_nodes: int, device: torch.device):
        """`max_nodes`: of any tree, root included."""
        nodes = (num_slots, max_nodes)
        self.token_ids = torch.zeros(nodes, dtype=torch.int64, device=device)
        self.parents = torch.zeros(nodes, dtype=torch.int64, device=device)
        self.depths = torch.zeros(nodes, dtype=torch.int64, device=device)
        self.scores = torch.zeros(nodes, dtype=torch.float32, device=device)
        self.ancestors = torch.zeros(*nodes, max_nodes, dtype=torch.bool, device=device)
        self.num_nodes = torch.ones(num_slots, dtype=torch.int64, device=device)

    def store(self, slots: torch.Tensor, trees: Trees) -> None:
        """Put the trees of a batch into the slots [num_reqs] of their requests."""
        self.token_ids[slots], self.parents[slots], self.depths[slots] = trees.token_ids, trees.parents, trees.depths
        self.scores[slots], self.ancestors[slots], self.num_nodes[slots] = trees.scores, trees.ancestors, trees.num_nodes

    def clear(self, slots: torch.Tensor) -> None:
        """Leave the root alone in slots [num_reqs]."""
        self.num_nodes[slots] = 1
