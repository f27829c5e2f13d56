"""Sampling noise per position: known before it is used, consumed only by tokens that are emitted.

vLLM's sampler on CPU draws one integer seed per row and position and takes `argmax(logits / T + gumbel(seed, token))`, where the
noise of a token is a hash of (seed, token). A request's generator is thus a stream of seeds, one per emitted token. Looking
ahead in that stream tells the drafter which noise the target will use at each coming position, whatever token stands before it.
With `use_fp64_gumbel` it is a stream of rows of noise: algorithm/noise_rows.py. (vLLM's V2 runner has a hash of seed, position and
token instead: engine/v2/noise.py.)
"""

import torch

from vllm_eagle import native

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # SplitMix64's increment and multipliers as signed 64-bit integers
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_MAX_SEED = 2**31


def draws_seeds(device: torch.device, exact: bool = False) -> bool:
    """Whether vLLM's sampler draws seeds there: not where it fills rows, nor where it does so exactly, in float64, on CPU."""
    return device.type == "cpu" and not exact


def draw_seed(generator: torch.Generator) -> torch.Tensor:  # [1] int64
    """What vLLM's CPU sampler draws from a request's generator for one position."""
    return torch.randint(0, _MAX_SEED, (1,), generator=generator, dtype=torch.long)


def peek_seeds(generator: torch.Generator, num_positions: int) -> torch.Tensor:  # [num_positions] int64
    """The seeds that vLLM's CPU sampler will draw from `generator` for the coming positions; consumes none."""
    state = generator.get_state()
    # One draw per position: a draw of several numbers at once need not continue the stream in the same way.
    seeds = [draw_seed(generator) for _ in range(num_positions)]
    generator.set_state(state)
    return torch.cat(seeds)


def gumbel(
    seeds: torch.Tensor,  # [...] int64
    tokens: int | torch.Tensor,  # size of the vocabulary, or token ids [tokens] int64
) -> torch.Tensor:  # [..., tokens] float32
    """The noise that vLLM's `fused_gumbel_argmax` adds to the logits of these tokens in a row with this seed.

    Equals it up to float32 rounding; the drafter only ranks by it. Hash: SplitMix64 (Steele, Lea and Flood 2014).
    """
    if seeds.device.type == "cpu" and native.runs():
        count, chosen = (tokens, None) if isinstance(tokens, int) else (0, tokens)
        found: torch.Tensor = torch.ops.vllm_eagle.gumbel(seeds.flatten(), chosen, count)
        return found.view(*seeds.shape, -1)
    token_ids = torch.arange(tokens, device=seeds.device) if isinstance(tokens, int) else tokens
    bits = _shift(_mix(_mix(seeds)[..., None] + (token_ids + 1) * _GAMMA), 11)
    uniform = (bits.double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform)).float()


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)
