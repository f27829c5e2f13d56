"""Where two engines' tokens differ: how close were the scores?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vllm_eagle.algorithm.noise import draws_seeds, gumbel, peek_seeds
from vllm_eagle.algorithm.noise_rows import NoiseRows
from vllm_eagle.bench.engines.offline import Generated

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams


def gaps(
    llm: "LLM",
    prompts: Sequence[list[int]],
    params: Sequence["SamplingParams"],
    plain: Generated,
    found: Generated,
    **options: Any,
) -> list[float]:
    """At each prompt's first differing token: by how much plain vLLM preferred its own token, noise included, in nats.

    `llm` is an engine without speculation and with max_logprobs=-1; `options` go to its `generate`. Zero within the rounding of the
    dtype says that rounding decided.
    """
    from vllm import SamplingParams

    vocab = llm.llm_engine.model_config.get_vocab_size()
    probe = SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
    each: list[float] = []
    for i, (one, other) in enumerate(zip(plain.token_ids, found.token_ids, strict=True)):
        if one == other:
            continue
        position = next(p for p, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        prompt = {"prompt_token_ids": prompts[i] + one[:position]}
        logprobs = llm.generate([prompt], probe.clone(), use_tqdm=False, **options)[0].outputs[0].logprobs[0]
        gap = logprobs[one[position]].logprob - logprobs[other[position]].logprob
        temperature = params[i].temperature
        if temperature > 0:
            noise = noise_at(params[i].seed, position, vocab, "cuda" if torch.cuda.is_available() else "cpu")
            gap = gap / temperature + float(noise[one[position]] - noise[other[position]])
        each.append(round(gap, 5))
    return each


def noise_at(seed: int, position: int, vocab_size: int, device: str) -> torch.Tensor:  # [vocab_size] float32
    """What vLLM's sampler on that device adds to `logits / T` at this token of an answer, from 0, of a request with this seed."""
    generator = torch.Generator(device).manual_seed(seed)
    if draws_seeds(torch.device(device)):
        return gumbel(peek_seeds(generator, position + 1)[-1], vocab_size)
    return NoiseRows([generator], vocab_size).at(position + 1)[0]
