"""Training-time test: a head unrolled on its own outputs, at every position of the text at once.

Row t of the first pass sees the target's features 0..t and predicts the feature at t + 1. Row t of unrolled step i sees the same
features, then its own outputs of steps 1..i at row t, as a chain drafted from position t would when serving (EAGLE-3, arXiv
2503.01840, section 3.2 and figure 6). Its token input is the text's token t + 1 + i, its position t + i.

What rows of step 2 may see, for a text of 3 positions (one column per key; x = seen):

             target's features   own, step 1   own, step 2
    row 0         x . .             x . .         x . .
    row 1         x x .             . x .         . x .
    row 2         x x x             . . x         . . x
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from vllm_eagle.train.head.layer import Memory
from vllm_eagle.train.head.medusa import MedusaHead
from vllm_eagle.train.head.models import Head


class UnrolledMemory(Memory):
    """Keys and values of the first pass and of every unrolled step so far.

    With a window a row at position p sees positions above p - window only; 0: all.
    """

    def __init__(self, window: int = 0) -> None:
        self._window = window
        self._layers: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []  # keys and values, by step

    @property
    def first(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the first pass, [batch, kv_heads, seq, head_dim] each, by layer."""
        return [(keys[0], values[0]) for keys, values in self._layers]

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int) -> torch.Tensor:
        if layer == len(self._layers):
            self._layers.append(([], []))
        keys, values = self._layers[layer]
        keys.append(key)
        values.append(value)
        step = len(keys) - 1
        query = query.to(value.dtype)
        if step == 0 and 0 < self._window < query.shape[2]:
            seen = self._seen(query.shape[2], 0, query.device)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
        if step == 0:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        query = query.unflatten(1, (key.shape[1], -1)) * query.shape[-1] ** -0.5  # heads in groups that share keys
        num_rows = query.shape[3]
        seen = self._seen(num_rows, step, query.device)
        texts = (query @ keys[0][:, :, None].transpose(-1, -2)).masked_fill(~seen, -torch.inf)
        # Of its own outputs those of the last steps.
        first = 1 if self._window == 0 else max(1, step + 1 - self._window)
        own = [(query * own[:, :, None]).sum(-1, keepdim=True) for own in keys[first:]]
        weights = torch.cat([texts, *own], -1).softmax(-1, dtype=torch.float32).to(value.dtype)
        attended = weights[..., :num_rows] @ values[0][:, :, None]
        for row, own_value in enumerate(values[first:], start=num_rows):
            attended = attended + weights[..., row : row + 1] * own_value[:, :, None]
        return attended.flatten(1, 2)

    def _seen(self, num_rows: int, step: int, device: torch.device) -> torch.Tensor:
        """[num_rows, num_rows] bool, which of the text's rows each row sees in this step, in which row t stands at t + step."""
        seen = torch.ones(num_rows, num_rows, dtype=torch.bool, device=device).tril()
        return seen.triu(step - self._window + 1) if self._window else seen


def unroll(
    head: Head,
    token_ids: torch.Tensor,  # [batch, seq] int64
    features: torch.Tensor,  # [batch, seq, features], the target's
    num_steps: int,
    token_shift: int = 1,  # 0, for comparison only: the token of the feature itself instead of the next one
    window: int = 0,  # newest positions that a row sees; 0: all
) -> Iterator[torch.Tensor]:  # num_steps times [batch, seq, hidden]
    """Outputs of the first pass and the `num_steps - 1` unrolled ones; row t of step i stands for position t + 1 + i.

    Rows whose tokens lie beyond the end of the text hold nothing of use; leave them out of any loss.
    """
    if isinstance(head, MedusaHead):
        yield from head.drafts(features, num_steps)
        return
    memory = UnrolledMemory(window)
    hidden = head.fuse(features)
    positions = torch.arange(token_ids.shape[1], device=token_ids.device)[None]
    for step in range(num_steps):
        ahead = min(token_shift + step, token_ids.shape[1])
        tokens = F.pad(token_ids[:, ahead:], (0, ahead))
        hidden, ready = head(tokens, hidden, positions + step, memory)
        yield ready
