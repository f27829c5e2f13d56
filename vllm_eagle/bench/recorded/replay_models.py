"""vLLM's Llama and its EAGLE-1 head, which compute all they compute, and then say what replay.py drew for the position.

The feature carries the position to where logits are made: its first two components hold it in base 256, exact in bfloat16. The row
of position p tells the target's token at p + 1, and the head's guess of that at p + 2, for it reads the token at p + 1.
"""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.llama_eagle import EagleLlamaForCausalLM

from vllm_eagle.bench.recorded.replay import NUM_CLASSES, NUM_RANKS, PROFILE

FIRST_TOKEN = 100  # the head's tokens are this and the next ones, best first; after them, a token that it did not guess
_CERTAIN = 1e4
_BASE = 256


def draw(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Class (int64) and a uniform number in [0, 1) (float32) per position, both [num_rows]: a hash of it."""
    mixed = (positions.to(torch.int64) * 2654435761) & 0xFFFFFFFF
    for factor in (0x45D9F3B, 0x119DE1F3):
        mixed = ((mixed ^ (mixed >> 16)) * factor) & 0xFFFFFFFF
    mixed = mixed ^ (mixed >> 16)
    return mixed % NUM_CLASSES, (mixed // NUM_CLASSES % (1 << 20)).float() / (1 << 20)


def _mark(feature: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    feature[..., 0] = (positions // _BASE).to(feature.dtype)
    feature[..., 1] = (positions % _BASE).to(feature.dtype)
    return feature


def _marked(feature: torch.Tensor) -> torch.Tensor:
    # Rows of padding hold anything, and are read by nobody.
    high, low = (feature[..., i].float().nan_to_num(0.0, 0.0, 0.0).clamp(0, 1 << 20).long() for i in (0, 1))
    return high * _BASE + low


class ReplayedLlamaForCausalLM(LlamaForCausalLM):
    """The target: certain of one token at every position. For greedy decoding."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any):
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        accepted = torch.tensor(getattr(self.config, PROFILE)["accepted"], dtype=torch.float32)
        self.register_buffer("_cumulative", accepted.cumsum(1), persistent=False)

    def forward(self, input_ids: Any, positions: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, the position written into the feature."""
        return _mark(super().forward(input_ids, positions, *args, **kwargs), positions)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """As vLLM's, the drawn token raised above all."""
        logits = super().compute_logits(hidden_states)
        if logits is None:
            return None
        which, uniform = draw(_marked(hidden_states) + 1)
        rank = (uniform[:, None] >= self._cumulative[which]).sum(1, keepdim=True)
        return logits.scatter_(1, FIRST_TOKEN + rank, _CERTAIN)


class EagleReplayedLlamaForCausalLM(EagleLlamaForCausalLM):
    """The head: as sure of its best tokens as the recorded one was."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        best = torch.tensor(getattr(self.config, PROFILE)["probabilities"], dtype=torch.float32).clamp(min=1e-5)
        rest = (1 - best.sum(1, keepdim=True)).clamp(min=1e-5) / (self.config.vocab_size - NUM_RANKS)
        self.register_buffer("_best", best.log(), persistent=False)
        self.register_buffer("_rest", rest.log(), persistent=False)
        self.register_buffer("_tokens", torch.arange(FIRST_TOKEN, FIRST_TOKEN + NUM_RANKS), persistent=False)

    def forward(self, input_ids: Any, positions: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As vLLM's, the position written into both features."""
        last, feature = super().forward(input_ids, positions, *args, **kwargs)
        return _mark(last, positions), _mark(feature, positions)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """As vLLM's, then the recorded log-probabilities in their place."""
        logits = super().compute_logits(hidden_states)
        if logits is None:
            return None
        which, _ = draw(_marked(hidden_states) + 2)
        tokens = self._tokens.expand(len(logits), -1)
        return logits.copy_(self._rest[which].expand_as(logits)).scatter_(1, tokens, self._best[which].to(logits.dtype))
