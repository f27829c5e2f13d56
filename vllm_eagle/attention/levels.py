"""Attention metadata of the head's passes over tree levels, on every device."""

import torch

from vllm_eagle.algorithm.draft import Level
from vllm_eagle.ops.rows import TreeRows


class DraftLevels:
    """One context per request, and keys and values of the nodes so far.

    The nodes' keys and values are scratch: the next step's first pass computes those of accepted tokens anew from the target's
    true features.
    """

    def __init__(
        self,
        block_table: torch.Tensor,  # [num_reqs, max_blocks] int32
        context_lens: torch.Tensor,  # [num_reqs] int64
        longest_context: int,  # no context is longer; known without asking the device
    ):
        self.longest_context = longest_context
        self._block_table, self._context_lens = block_table, context_lens
        self._nodes: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # by layer: [num_reqs, nodes so far, kv_heads, head_dim]
        self._rows: TreeRows | None = None

    def start(self, level: Level) -> None:
        """Announce the rows of the next pass: num_reqs * width, request by request. A pass may have rows of padding after them."""
        num_reqs, width, num_nodes = level.ancestors.shape
        index = torch.arange(num_reqs, device=self._context_lens.device)
        self._rows = TreeRows(
            self._block_table,
            self._context_lens,
            first_rows=index * width,
            num_rows=torch.full_like(index, width),
            first_keys=index * num_nodes,
            num_keys=torch.full_like(index, num_nodes),
            visible=level.ancestors,
        )

    @property
    def rows(self) -> TreeRows:
        """Of the pass that was announced."""
        assert self._rows is not None
        return self._rows

    def add(self, layer_name: str, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a layer's keys and values of the pass, [at least num_reqs * width, kv_heads, head_dim].

        Returns those of all levels, request by request.
        """
        num_reqs, width, _ = self.rows.visible.shape
        new = [x[: num_reqs * width].unflatten(0, (num_reqs, width)) for x in (key, value)]
        if layer_name in self._nodes:
            new = [torch.cat(pair, dim=1) for pair in zip(self._nodes[layer_name], new, strict=True)]
        else:
            new = [x.clone() for x in new]  # a CUDA graph's own memory is written anew by the next pass
        self._nodes[layer_name] = new[0], new[1]
        return new[0].flatten(0, 1), new[1].flatten(0, 1)
