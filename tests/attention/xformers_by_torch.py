"""xformers' kernels want a GPU: here its attention is done in plain torch, from the very biases they would get."""

import pytest
import torch


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, ...]:
    """Attention [B, M, G, H, D] and log-sums [B, G, H, M], in the shapes of xformers."""
    assert key.shape[2:] == value.shape[2:] == query.shape[2:]
    scores = torch.einsum("bmghd,bkghd->bghmk", query.float(), key.float()) * scale + bias.float()
    return torch.einsum("bghmk,bkghd->bmghd", scores.softmax(-1), value.float()).to(query.dtype), scores.logsumexp(-1)


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put plain torch in the places of xformers' functions."""
    replace_kernels(monkeypatch)


def replace_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the fixture, for tests that do not always want it."""
    from xformers.ops import fmha

    def partial(query, key, value, attn_bias, scale, op):  # type: ignore[no-untyped-def]
        from vllm_eagle.ops.xformers_attention import PagedBlockDiagonalPaddedKeysMask

        assert type(attn_bias) is PagedBlockDiagonalPaddedKeysMask
        attn_bias.k_seqinfo.seqlen_py = attn_bias.k_seqinfo.seqlen.tolist()  # what a kernel reads; `materialize` reads the list
        total = attn_bias.block_tables.numel() * attn_bias.page_size
        bias = attn_bias.materialize((query.shape[1], total))
        bias = torch.nn.functional.pad(bias, (0, key.shape[1] - bias.shape[1]), value=float("-inf"))
        return dense(query, key, value, bias, scale)

    def whole(query, key, value, attn_bias, scale, op):  # type: ignore[no-untyped-def]
        assert attn_bias.shape == (query.shape[0], *query.shape[2:4], query.shape[1], key.shape[1])
        assert attn_bias.stride(-1) == 1
        assert attn_bias.stride(-2) % 8 == 0
        return dense(query, key, value, attn_bias, scale)

    def merge(parts, log_sums, output_dtype):  # type: ignore[no-untyped-def]
        total = torch.stack(log_sums).logsumexp(0)
        weights = [(x - total).exp().permute(0, 3, 1, 2)[..., None] for x in log_sums]
        return sum(weight * part.float() for weight, part in zip(weights, parts, strict=True)).to(output_dtype), total

    monkeypatch.setattr(fmha, "memory_efficient_attention_partial", partial)
    monkeypatch.setattr(fmha, "memory_efficient_attention_forward_requires_grad", whole)
    monkeypatch.setattr(fmha, "merge_attentions", merge)
