"""What decoder layers of a draft head are made of: parts of Llama layers, whose attention asks a memory for keys and values.

They serve training (unrolled over its own outputs, `unroll.py`) and evaluation (draft trees): what a row may see is the
memory's business. Parameter names are the checkpoint's, so `state_dict()` is what vLLM loads.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn


class Memory(Protocol):
    """Keys and values of earlier rows."""

    def attend(
        self,
        query: torch.Tensor,  # [batch, heads, rows, head_dim]
        key: torch.Tensor,  # [batch, kv_heads, rows, head_dim]
        value: torch.Tensor,  # [batch, kv_heads, rows, head_dim]
        layer: int,  # of the head, from 0
    ) -> torch.Tensor:  # [batch, heads, rows, head_dim]
        """Remember a layer's keys and values of the new rows and attend to all that each row may see."""


class Attention(nn.Module):
    """Grouped-query attention with rotary positions. `input_size` is twice the hidden size in EAGLE-3's first layer.

    The config names biases and norms as vLLM's classes read them (heads/form.py).
    """

    def __init__(self, config: Any, input_size: int, layer: int = 0):
        super().__init__()
        self.head_dim, self._layer = config.head_dim, layer
        of_all = bool(getattr(config, "attention_bias", False))
        bias = bool(getattr(config, "qkv_bias", of_all))
        normed = bool(getattr(config, "qk_norm", False))
        self.q_proj = nn.Linear(input_size, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(input_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(input_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=of_all and not normed)
        # As in Qwen3, whose layers have no bias of o_proj.
        self.q_norm = RMSNorm(config, self.head_dim) if normed else None
        self.k_norm = RMSNorm(config, self.head_dim) if normed else None

    def forward(
        self,
        hidden: torch.Tensor,  # [batch, rows, input_size]
        rotation: tuple[torch.Tensor, torch.Tensor],  # cos and sin, [batch or 1, rows, head_dim]
        memory: Memory,
    ) -> torch.Tensor:  # [batch, rows, hidden]
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        batch, rows, _ = hidden.shape
        query, key, value = (
            project(hidden).view(batch, rows, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = apply_rotary_pos_emb(query, key, *rotation)
        attended = memory.attend(query, key.to(value.dtype), value, self._layer)
        return self.o_proj(attended.transpose(1, 2).reshape(batch, rows, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Any):
        super().__init__()
        bias = bool(getattr(config, "mlp_bias", False))
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class RMSNorm(nn.RMSNorm):
    """torch's norm in the type of its weights, which under autocast is wider than the input's."""

    def __init__(self, config: Any, size: int | None = None):
        super().__init__(size or config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.to(self.weight.dtype))


class LlamaLayer(nn.Module):
    """Llama's own, as every layer of a head after the first one is. Without its input norm it is the first one of EAGLE-1."""

    def __init__(self, config: Any, layer: int, input_norm: bool = True):
        super().__init__()
        self.self_attn = Attention(config, config.hidden_size, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config) if input_norm else nn.Identity()
        self.post_attention_layernorm = RMSNorm(config)

    def forward(self, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], memory: Memory) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotation, memory)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def rotary(config: Any) -> nn.Module:
    """Rotary angles as transformers computes them, scaling types included; no weights."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(config)
