"""xformers' backend, on top of plain torch (xformers_by_torch.py)."""

from importlib.util import find_spec

import pytest
import torch

from tests.attention.xformers_by_torch import by_torch  # noqa: F401 -- a fixture
from vllm_eagle.ops.cases import Attention, attention_inputs
from vllm_eagle.ops.rows import TreeRows

pytestmark = pytest.mark.skipif(
    find_spec("xformers") is None, reason="needs xformers: pip install --no-deps -r vllm_eagle/locks/interop.lock"
)


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize(
    "shape",
    [
        Attention([(1, 40)], block_size=64, token_major=True),
        Attention([(17, 100), (1, 33), (5, 1), (61, 257)], block_size=64, token_major=True),
        Attention([(9, 64), (4, 65)], heads=(4, 4, 32), block_size=64, token_major=True),
        Attention([(6, 200), (3, 7)], block_size=128, token_major=True, levels=True),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_it_equals_the_reference(shape: Attention, seed: int) -> None:
    from vllm_eagle.ops import tree_attention, xformers_attention

    query, key, value, kv_cache, rows = attention_inputs(shape, torch.device("cpu"), seed)
    scale = shape.heads[2] ** -0.5
    found, expected = (torch.full_like(query, 7.0) for _ in range(2))
    longest = max(context for _, context in shape.sizes) + 5
    xformers_attention.tree_attention(query, key, value, kv_cache, rows, scale, found, longest)
    tree_attention.reference(query, key, value, kv_cache, rows, scale, expected)
    assert torch.allclose(found, expected, atol=2e-5, rtol=2e-5)


def test_its_kernel_takes_our_bias() -> None:
    from xformers.ops import fmha

    from vllm_eagle.ops.xformers_attention import PagedBlockDiagonalPaddedKeysMask, _context_bias

    zero = torch.zeros(2, dtype=torch.long)
    rows = TreeRows(torch.zeros(2, 4, dtype=torch.int32), zero + 70, zero, zero + 3, zero, zero + 3, torch.ones(2, 3, 3).bool())
    bias = _context_bias(rows, 128, 3, 64)
    assert bias.k_seqinfo.seqlen.tolist() == [70, 70]
    assert bias.q_seqinfo.seqstart_py == [0, 3, 6]
    for op in (fmha.triton_splitk.FwOp, fmha.flash3.FwOp):
        assert PagedBlockDiagonalPaddedKeysMask in op.SUPPORTED_ATTN_BIAS_TYPES
    heads = torch.zeros(1, 6, 2, 4, 64, dtype=torch.float16), torch.zeros(1, 256, 2, 4, 64, dtype=torch.float16)
    inputs = fmha.Inputs(query=heads[0], key=heads[1], value=heads[1], attn_bias=bias)
    inputs.validate_inputs()
    reasons = fmha.triton_splitk.FwOp.not_supported_reasons(inputs)
    assert [r for r in reasons if "device" not in r and "triton" not in r and "built" not in r] == []
