"""A head's reduced draft vocabulary: the tokens that occur most often in the answers, and the maps between both numberings."""

from collections.abc import Collection, Iterable

import torch


def count_tokens(texts: Iterable[tuple[torch.Tensor, torch.Tensor]], vocab_size: int) -> torch.Tensor:  # [vocab] int64
    """How often each token is to be drafted; `texts` yields token ids [length] and loss mask [length] bool."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for token_ids, mask in texts:
        counts += torch.bincount(token_ids[mask].long(), minlength=vocab_size)
    return counts


def draft_vocabulary(
    counts: torch.Tensor,  # [vocab] int64
    size: int,
    always: Collection[int] = (),  # tokens that are in it however rare they are
) -> tuple[torch.Tensor, torch.Tensor]:  # d2t [size] int64, t2d [vocab] bool
    """The `size` most frequent tokens, in the target's order (EAGLE-3's checkpoint format).

    `draft id + d2t[draft id]` is the target's id; `t2d` marks the tokens that can be drafted.
    """
    if not 0 < size <= len(counts):
        raise ValueError(f"--draft-vocab {size} must lie between 1 and the target's vocabulary of {len(counts)}")
    ranked = counts.clone()
    ranked[list(always)] = int(counts.max()) + 1
    # A stable sort: equal counts are kept in order of token id, so that the same data gives the same head.
    chosen = ranked.sort(descending=True, stable=True).indices[:size].sort().values
    t2d = torch.zeros(len(counts), dtype=torch.bool)
    t2d[chosen] = True
    return chosen - torch.arange(size), t2d


def coverage(counts: torch.Tensor, t2d: torch.Tensor) -> float:
    """Share of the answers' tokens that the head can draft."""
    return (counts[t2d].sum() / counts.sum().clamp(min=1)).item()
