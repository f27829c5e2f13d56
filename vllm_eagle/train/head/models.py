"""Draft heads as torch modules: EAGLE-1 (EAGLE-2 uses the same) and EAGLE-3, for training and evaluation.

Both take rows of (token t + 1, hidden t): the token one step ahead resolves what the target sampled after feature t (EAGLE-1, arXiv
2401.15077, section 3.1). Parameter names are those of the checkpoints that vLLM loads. Embedding and, in EAGLE-1, the LM head are
the target's: shared, frozen and not part of the head.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from vllm_eagle.train.features.finish import Finish
from vllm_eagle.train.head.layer import MLP, Attention, LlamaLayer, Memory, RMSNorm, rotary


class Head(nn.Module):
    """What training and evaluation know of a head.

    Attributes:
        config: transformers' LlamaConfig with the EAGLE fields, as config.json holds it.
        target_ids: [draft_vocab] int64, the target's token id of each logit; None where they are the same.
        finish: what becomes of the products with `lm_head_weights`.
    """

    def __init__(self, config: Any, embed: nn.Module):
        super().__init__()
        self.config = config
        self.finish = Finish()
        self.rotary = rotary(config)
        # In a tuple the target's modules are not registered: no gradient, no checkpoint, no copy per device.
        self._embed: tuple[Any] = (embed,)

    @property
    def target_ids(self) -> torch.Tensor | None:
        return None

    @property
    def max_steps(self) -> int | None:
        """How deep it can draft; None: as deep as one likes."""
        return None

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[...] int64 -> [..., hidden]."""
        own = getattr(self, "embed_tokens", None)
        return (own or self._embed[0])(token_ids)

    @abstractmethod
    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """The target's features [batch, rows, features] -> hidden states [batch, rows, hidden], the head's own input."""

    @abstractmethod
    def forward(
        self,
        token_ids: torch.Tensor,  # [batch, rows] int64, the token after each hidden state
        hidden: torch.Tensor,  # [batch, rows, hidden], fused features or earlier outputs
        positions: torch.Tensor,  # [batch or 1, rows] int64
        memory: Memory,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-> input of the next step and what the LM head takes, both [batch, rows, hidden]."""

    @property
    @abstractmethod
    def lm_head_weights(self) -> list[torch.Tensor]:
        """[draft_vocab, hidden], of all steps or, in Medusa, one of each: `logits` is the product with it, finished."""

    @abstractmethod
    def logits(self, ready: torch.Tensor, step: int = 0) -> torch.Tensor:
        """[..., hidden] -> [..., draft_vocab]; `step` matters to Medusa only, which has an LM head per step."""


class EagleHead(Head):
    """EAGLE-1: fc(cat(embedding of the next token, feature)) -> decoder layers, of which the first has no input norm -> feature."""

    def __init__(self, config: Any, embed: nn.Module, lm_head: nn.Module, finish: Finish):
        super().__init__(config, embed)
        self.finish = finish
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=bool(getattr(config, "fc_bias", False)))
        self.layers = nn.ModuleList([LlamaLayer(config, i, input_norm=i > 0) for i in range(config.num_hidden_layers)])
        self._lm_head: tuple[Any] = (lm_head,)
        self._draft_ids: torch.Tensor | None = None
        self._draft_rows: tuple[Any] = (lm_head.weight,)

    @property
    def target_ids(self) -> torch.Tensor | None:
        return self._draft_ids

    def limit_to(self, draft_ids: torch.Tensor) -> None:
        """Draft the tokens `draft_ids` [draft_vocab] int64 only, by their rows of the target's LM head."""
        weight = self._lm_head[0].weight
        self._draft_ids = draft_ids.to(weight.device)
        self._draft_rows = (weight[self._draft_ids],)

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        return features

    def forward(
        self, token_ids: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor, memory: Memory
    ) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings = self.embed(token_ids)
        mixed = self.fc(torch.cat([embeddings, hidden.to(embeddings.dtype)], dim=-1))
        predicted, rotation = mixed, self.rotary(mixed, positions)
        for layer in self.layers:
            predicted = layer(predicted, rotation, memory)
        return predicted, predicted

    @property
    def lm_head_weights(self) -> list[torch.Tensor]:
        return list(self._draft_rows)

    def logits(self, ready: torch.Tensor, step: int = 0) -> torch.Tensor:
        (rows,) = self._draft_rows
        return self.finish(ready.to(rows.dtype) @ rows.T)


class _Eagle3Layer(nn.Module):
    """EAGLE-3's first decoder layer: embedding and hidden state are normed and enter attention side by side."""

    def __init__(self, config: Any):
        super().__init__()
        self.self_attn = Attention(config, 2 * config.hidden_size)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config)
        self.hidden_norm = RMSNorm(config)
        self.post_attention_layernorm = RMSNorm(config)
        self._norm_before_residual = bool(getattr(config, "norm_before_residual", False))

    def forward(
        self, embeddings: torch.Tensor, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], memory: Memory
    ) -> torch.Tensor:
        normed = self.hidden_norm(hidden)
        residual = normed if self._norm_before_residual else hidden
        hidden = residual + self.self_attn(torch.cat([self.input_layernorm(embeddings), normed], dim=-1), rotation, memory)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Eagle3Head(Head):
    """EAGLE-3: low, mid and high-layer features fused by fc; own LM head over a reduced draft vocabulary."""

    d2t: torch.Tensor  # [draft_vocab] int64: target id minus draft id
    t2d: torch.Tensor  # [vocab] bool: tokens that the head can draft

    def __init__(self, config: Any, embed: nn.Module):
        super().__init__(config, embed)
        size, num_layers = getattr(config, "target_hidden_size", None) or config.hidden_size, len(aux_layers(config))
        # Norms that later trainers added, under the names that vLLM and speculators give them.
        self.input_norm = RMSNorm(config, size * num_layers) if getattr(config, "norm_before_fc", False) else None
        normed = getattr(config, "fc_norm", False)
        self.fc_norm = nn.ModuleList([RMSNorm(config, size) for _ in range(num_layers)]) if normed else None
        self._norm_output = bool(getattr(config, "norm_output", False))
        self.fc = nn.Linear(size * num_layers, config.hidden_size, bias=False)
        self.midlayer = _Eagle3Layer(config)
        # Layers after the first read its output alone; by their numbers, as checkpoints have them.
        self.layers = nn.ModuleDict({str(i): LlamaLayer(config, i) for i in range(1, config.num_hidden_layers)})
        self.norm = RMSNorm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        if config.draft_vocab_size < config.vocab_size:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
            self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))

    @property
    def target_ids(self) -> torch.Tensor | None:
        if self.config.draft_vocab_size == self.config.vocab_size:
            return None
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(features.to(self.fc.weight.dtype))

    def forward(
        self, token_ids: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor, memory: Memory
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rotation = self.rotary(hidden, positions)
        hidden = self.midlayer(self.embed(token_ids), hidden, rotation, memory)
        for layer in self.layers.values():
            hidden = layer(hidden, rotation, memory)
        ready = self.norm(hidden)
        return ready if self._norm_output else hidden, ready

    @property
    def lm_head_weights(self) -> list[torch.Tensor]:
        return [self.lm_head.weight]

    def logits(self, ready: torch.Tensor, step: int = 0) -> torch.Tensor:
        return self.lm_head(ready)


def aux_layers(config: Any) -> list[int]:
    """Decoder layers whose input feeds an EAGLE-3 head, low to high; layer n stands for the last layer's output."""
    nested = getattr(config, "eagle_config", None) or {}
    named = getattr(config, "eagle_aux_hidden_state_layer_ids", None) or nested.get("eagle_aux_hidden_state_layer_ids")
    return [int(layer) for layer in named or []]
