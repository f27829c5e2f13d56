"""The noise that the sampler of vLLM's V2 runner adds to logits: a hash of seed, position and token, so it is known ahead.

Every request has a seed there, its own or one drawn when it is admitted. vLLM's drafters shift the position on purpose, to draft
independently; trees are drafted with the very noise that verification will use (vllm_eagle/algorithm/draft.py).
"""

import torch
import triton
import triton.language as tl
from vllm.v1.worker.gpu.sample.gumbel import _log1p_neg_stable, murmur3_uniform32, murmur3_uniform64

_TILE = 1024


@triton.jit(do_not_specialize=["width"])
def _noise(
    out, seeds, temperatures, slots, positions, token_ids, width,
    HAS_IDS: tl.constexpr, USE_FP64: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = place < width
    token = place
    if HAS_IDS:
        token = tl.load(token_ids + place, mask=inside, other=0).to(tl.int32)
    slot = tl.load(slots + request)
    seed, position = tl.load(seeds + slot), tl.load(positions + request)
    if USE_FP64:
        noise = (-tl.log(-tl.log(murmur3_uniform64(seed, position, token)))).to(tl.float32)
    else:
        noise = -tl.log(-_log1p_neg_stable(murmur3_uniform32(seed, position, token)))
    sampled = tl.load(temperatures + slot) > 0
    tl.store(out + request.to(tl.int64) * width + place, tl.where(sampled, noise, 0.0), mask=inside)


def coming_noise(
    seeds: torch.Tensor,  # [num_slots] int64
    temperatures: torch.Tensor,  # [num_slots] float32, 0 is greedy
    slots: torch.Tensor,  # [num_reqs] int64
    positions: torch.Tensor,  # [num_reqs] int64, of the row whose logits are sampled
    token_ids: torch.Tensor | None,  # [draft_vocab] int64, of which tokens; None: of all
    vocab_size: int,
    use_fp64: bool = False,  # as the sampler does
) -> torch.Tensor:  # [num_reqs, draft_vocab or vocab_size] float32
    """Noise that `gumbel_sample` will add; zero where decoding is greedy."""
    width = vocab_size if token_ids is None else len(token_ids)
    out = torch.empty(len(slots), width, dtype=torch.float32, device=slots.device)
    _noise[(len(slots), triton.cdiv(width, _TILE))](
        out, seeds, temperatures, slots, positions.contiguous(), token_ids, width,
        HAS_IDS=token_ids is not None, USE_FP64=use_fp64, TILE=_TILE,
    )  # fmt: skip
    return out
