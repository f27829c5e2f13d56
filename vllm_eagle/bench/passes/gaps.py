"""Where two engines' tokens differ: how close were the scores?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vllm_eagle.algorithm.noise import gumbel, peek_seeds
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
            seed, before = params[i].seed, len(prompts[i]) + position - 1
            noise = on_cuda(seed, before, vocab) if torch.cuda.is_available() else on_cpu(seed, position, vocab)
            gap = gap / temperature + float(noise[one[position]] - noise[other[position]])
        each.append(round(gap, 5))
    return each


def on_cpu(seed: int, place: int, vocab_size: int) -> torch.Tensor:  # [vocab_size] float32
    """What vLLM's V1 sampler adds to `logits / T` at this token of an answer, from 0, of a request with this seed."""
    return gumbel(peek_seeds(torch.Generator().manual_seed(seed), place + 1)[-1], vocab_size)


def on_cuda(seed: int, position: int, vocab_size: int, device: str = "cuda") -> torch.Tensor:  # [vocab_size] float32
    """What vLLM's V2 sampler adds to them behind the token at this position of the text, from 0."""
    from vllm_eagle.engine.v2.noise import coming_noise  # needs Triton

    seeds, slots, positions = (torch.tensor([x], device=device) for x in (seed, 0, position))
    return coming_noise(seeds, torch.ones(1, device=device), slots, positions, None, vocab_size)[0]
