"""The draft trees of all requests on the device, by the slot that vLLM's V2 runner gives a request."""

import torch

from vllm_eagle.ops.rerank import Trees
from vllm_eagle.ops.rows import TreeRows


class SlotTrees:
    """Written after drafting, read by the next step. Node 0 is the root, the last emitted token.

    Places past a tree's last node hold valid tokens, hang under the root and are counted out by `num_nodes`. There is one slot more
    than requests may have: slot -1, for the padding of batches. Roots see themselves from the start: a pass that is captured as a
    whole takes requests for trees for which nothing was drafted yet.
    """

    def __init__(self, num_slots: int, max_nodes: int, device: torch.device):
        """`max_nodes`: of any tree, root included."""
        nodes = (num_slots + 1, max_nodes)
        self.token_ids = torch.zeros(nodes, dtype=torch.int64, device=device)
        self.parents = torch.zeros(nodes, dtype=torch.int64, device=device)
        self.depths = torch.zeros(nodes, dtype=torch.int64, device=device)
        self.scores = torch.zeros(nodes, dtype=torch.float32, device=device)
        self.ancestors = torch.zeros(*nodes, max_nodes, dtype=torch.bool, device=device)
        self.ancestors[:, :, 0] = True
        self.num_nodes = torch.ones(num_slots + 1, dtype=torch.int64, device=device)

    def store(self, slots: torch.Tensor, trees: Trees) -> None:
        """Put the trees of a batch into the slots [num_reqs] of their requests, -1 where there is none."""
        self.token_ids[slots], self.parents[slots], self.depths[slots] = trees.token_ids, trees.parents, trees.depths
        self.scores[slots], self.ancestors[slots], self.num_nodes[slots] = trees.scores, trees.ancestors, trees.num_nodes

    def clear(self, slots: torch.Tensor) -> None:
        """Leave the root alone in slots [num_reqs]."""
        self.num_nodes[slots] = 1


class BatchTrees:
    """The trees of a verification pass as kernels take them, by place in the batch.

    Its tensors stay where they are: a CUDA graph was captured with these and reads what `fill` has put there since.
    """

    def __init__(self, max_num_reqs: int, max_nodes: int, device: torch.device):
        """`max_nodes`: of any tree, root included."""
        self._context_lens, self._first_rows, self._num_rows = torch.zeros(3, max_num_reqs, dtype=torch.int64, device=device)
        self._visible = torch.zeros(max_num_reqs, max_nodes, max_nodes, dtype=torch.bool, device=device)

    def fill(
        self,
        trees: SlotTrees,
        slots: torch.Tensor,  # [num_reqs] int64
        query_start_loc: torch.Tensor,  # [num_trees + 1] int32, num_trees at least num_reqs: the rest is padding, without rows
        seq_lens: torch.Tensor,  # [num_trees] int32, rows included
    ) -> None:
        """Take the trees of a batch, whose requests have no rows but those of their trees."""
        num_trees, num_rows = len(seq_lens), query_start_loc.diff()
        self._first_rows[:num_trees] = query_start_loc[:-1]
        self._num_rows[:num_trees] = num_rows
        self._context_lens[:num_trees] = (seq_lens - num_rows).clamp(min=0)
        chosen = min(len(slots), num_trees)
        torch.index_select(trees.ancestors, 0, slots[:chosen], out=self._visible[:chosen])

    def rows(self, block_table: torch.Tensor, most_rows: int) -> TreeRows:
        """Of as many trees as `block_table` [num_trees, max_blocks] has rows, with at most `most_rows` nodes each."""
        num_trees, first_rows, num_rows = len(block_table), self._first_rows[: len(block_table)], self._num_rows[: len(block_table)]
        visible = self._visible[:num_trees, :most_rows]
        return TreeRows(block_table, self._context_lens[:num_trees], first_rows, num_rows, first_rows, num_rows, visible)
