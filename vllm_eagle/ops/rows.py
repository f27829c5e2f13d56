"""Which rows of a pass belong to which draft tree, and what they see: the batch as every tree kernel takes it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class TreeRows:
    """Every tree has its context in the paged cache and keys of its own beside it.

    In a verification pass the tree's keys are its rows; in a pass of the head over a level they are the rows of all levels so far.
    Keys come parents first, and a row sees all its ancestors: so it stands at position `context_len + keys it sees - 1`.
    """

    block_table: torch.Tensor  # [num_trees, max_blocks] int32
    context_lens: torch.Tensor  # [num_trees] int64, tokens in the cache
    first_rows: torch.Tensor  # [num_trees] int64, rows of the query: consecutive
    num_rows: torch.Tensor  # [num_trees] int64
    first_keys: torch.Tensor  # [num_trees] int64, the tree's own keys and values: consecutive
    num_keys: torch.Tensor  # [num_trees] int64
    visible: torch.Tensor  # [num_trees, max_rows, max_keys] bool, by row and key of the tree


def within_window(visible: torch.Tensor, context_len: int, window: int) -> torch.Tensor:
    """What the rows of one tree see of its context and of its own keys, [num_rows, context_len + num_keys] bool.

    Args:
        visible: [num_rows, num_keys] bool, of its own keys without a window.
        context_len: tokens in the cache.
        window: a row at position p sees positions above p - window; 0: all.
    """
    seen = torch.nn.functional.pad(visible, (context_len, 0), value=True)
    if window == 0:
        return seen
    nth = visible.cumsum(1) - 1  # of the row's keys in its own tree: where these stand, from the context's end
    context = torch.arange(context_len, device=visible.device).expand(len(visible), -1)
    return seen & (torch.cat([context, context_len + nth], 1) > context_len + nth[:, -1:] - window)
