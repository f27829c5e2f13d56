"""Answers of the target itself, with the noise that vLLM's sampler would have used, so that drafting can be replayed on them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from vllm_eagle.algorithm.noise import gumbel, peek_seeds
from vllm_eagle.train.features.target import Features, FrozenTarget


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt, its answer, and how the target would have gone on: a tree may be accepted beyond the end of the answer."""

    token_ids: list[int]
    num_prompt: int
    num_answer: int  # tokens that a server returns, the end-of-text token included
    seeds: torch.Tensor  # [len(token_ids) - num_prompt] int64, of the noise at each generated position; zeros if greedy

    def seed_at(self, index: int) -> int:
        """Seed of the noise at token `index`; 0 beyond the text, where no token is known to compare with."""
        offset = index - self.num_prompt
        return int(self.seeds[offset]) if offset < len(self.seeds) else 0


@torch.no_grad()
def write_answers(
    target: FrozenTarget,
    prompts: Sequence[list[int]],
    max_tokens: int,
    margin: int,  # tokens to go on after the answer
    temperature: float = 0.0,
    seed: int = 0,  # prompt i samples with seed + i, as `vllm-eagle compare` has it
    batch: int = 32,
    on_token: Callable[[], object] = lambda: None,  # called after each token of a batch, for progress
) -> list[Text]:
    """Answer every prompt greedily, or sample as vLLM's CPU sampler does."""
    texts: list[Text | None] = [None] * len(prompts)
    order, end_tokens = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), target.end_tokens
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        seeds = torch.zeros(len(chosen), max_tokens + margin, dtype=torch.long)
        if temperature > 0:
            for row, i in enumerate(chosen):
                seeds[row] = peek_seeds(torch.Generator().manual_seed(seed + i), max_tokens + margin)
        answers = _decode(target, [prompts[i] for i in chosen], seeds, temperature, on_token)
        for row, i in enumerate(chosen):
            answer = answers[row].tolist()
            ends = [k + 1 for k, token in enumerate(answer[:max_tokens]) if token in end_tokens]
            num_answer = ends[0] if ends else max_tokens
            kept = num_answer + margin
            texts[i] = Text(prompts[i] + answer[:kept], len(prompts[i]), num_answer, seeds[row, :kept])
    return [text for text in texts if text is not None]


def _decode(
    target: FrozenTarget, prompts: list[list[int]], seeds: torch.Tensor, temperature: float, on_token: Callable[[], object]
) -> torch.Tensor:  # [batch, tokens] int64
    """Plain decoding of left-padded prompts; one column of `seeds` [batch, tokens] per token."""
    from transformers import DynamicCache

    device, width = target.device, max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, tokens = DynamicCache(config=target.config), []
    for column in range(seeds.shape[1]):
        hidden = target.decoder(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        logits = target.logits(hidden)
        if temperature > 0:
            logits = logits / temperature + gumbel(seeds[:, column].to(device), logits.shape[1])
        ids = logits.argmax(-1, keepdim=True)
        tokens.append(ids)
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
        positions = positions[:, -1:] + 1
        on_token()
    return torch.cat(tokens, 1).cpu()


@dataclass(frozen=True, slots=True)
class Read:
    """A batch of texts with the target's features."""

    texts: list[Text]
    token_ids: torch.Tensor  # [batch, seq] int64, right-padded
    features: Features


def read_texts(target: FrozenTarget, texts: Sequence[Text], aux: Sequence[int], batch: int = 32) -> Iterator[Read]:
    """Features of all texts, batch by batch, in order."""
    for first in range(0, len(texts), batch):
        some = list(texts[first : first + batch])
        width = max(len(text.token_ids) for text in some)
        ids = torch.tensor([text.token_ids + [0] * (width - len(text.token_ids)) for text in some], device=target.device)
        yield Read(some, ids, target.features(ids, aux))
