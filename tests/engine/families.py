"""Random targets of many families, and heads that know them: overfitted in seconds on what they are going to be asked."""

from pathlib import Path
from typing import Any

import torch
import transformers

from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.algorithm.noise import peek_seeds
from vllm_eagle.evaluate.simulate import replay
from vllm_eagle.evaluate.texts import Text, read_texts, write_answers
from vllm_eagle.train.data.examples import Example
from vllm_eagle.train.features.target import FrozenTarget
from vllm_eagle.train.head.models import Head, aux_layers
from vllm_eagle.train.head.objective import LossWeights, Objective
from vllm_eagle.train.run.build import new_head
from vllm_eagle.train.run.settings import Method, TrainSettings

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 256, 128, 4, 2, 32, 256
PROMPTS = [list(range(10 + 7 * i, 30 + 9 * i)) for i in range(6)]
NUM_TOKENS = 32
NUM_PASSES = 60  # over the texts to be learnt
NUM_DRAFT_TOKENS = 16
MARGIN = TreeConfig.from_options(NUM_DRAFT_TOKENS, {}).depth_limit + 1  # tokens behind an answer, up to which trees may reach
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

# Class in transformers: what makes it special. Scales and caps are such that drafts without them would be wrong.
TARGETS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Mistral": {},
    "Granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.3, "attention_multiplier": 0.1},
    "Gemma": {"tie_word_embeddings": False},
    "Gemma2": {"attn_logit_softcapping": None, "final_logit_softcapping": 5.0, "sliding_window": 1024, "query_pre_attn_scalar": 32},
    "Gemma3": {"sliding_window": 1024, "query_pre_attn_scalar": 32, "tie_word_embeddings": False},
    "Cohere": {"logit_scale": 0.0625},
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {**_MOE, "shared_expert_intermediate_size": 64},
    "Qwen3Moe": _MOE,
    "Qwen3": {},
    "Phi3": {"pad_token_id": 0},
    "SmolLM3": {"pad_token_id": 0, "tie_word_embeddings": False},
    "Glm4": {"pad_token_id": 0},
    "Olmo2": {"pad_token_id": 0},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 4.0, "embedding_multiplier": 6.0},
    "Nemotron": {},
    "Olmoe": {**_MOE, "pad_token_id": 0},
    "StableLm": {},
}
_CONFIGS = {"Gemma3": "Gemma3TextConfig"}


def model_of(family: str, **changes: Any) -> Any:
    """A random model of transformers, its logits far enough apart for exact comparisons."""
    torch.manual_seed(8)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": 4, "num_attention_heads": HEADS}
    sizes |= {"vocab_size": VOCAB, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "max_position_embeddings": 512}
    sizes |= {"bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2}
    config = getattr(transformers, _CONFIGS.get(family, f"{family}Config"))(**sizes | TARGETS.get(family, {}) | changes)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def even_embedding(model: Any) -> None:
    """Give all tokens embeddings of one length around zero, as norms leave them."""
    table = model.get_input_embeddings().weight
    table -= table.mean(1, keepdim=True)
    table /= table.pow(2).mean(1, keepdim=True).sqrt().clamp(min=1e-6)  # the padding's row is zero


def half_known(model: Any) -> None:
    """Let layers add a little to the token's embedding: enough that attention decides, so little that a head which hands the
    embedding on is often right.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter *= 0.5 if "o_proj" in name else 0.02
        even_embedding(model)


def answers(target: FrozenTarget, temperature: float) -> list[Text]:
    """What transformers has the target say to the prompts; prompt i samples with seed i."""
    return write_answers(target, PROMPTS, NUM_TOKENS, MARGIN, temperature)


def said(replies: list[list[list[int]]], temperature: float) -> list[Text]:
    """The same of what vLLM has it say, NUM_TOKENS + MARGIN tokens: where two tokens are as likely, the two may differ."""
    texts = []
    for i, (prompt, [reply]) in enumerate(zip(PROMPTS, replies, strict=True)):
        seeds = peek_seeds(torch.Generator().manual_seed(i), len(reply))
        texts.append(Text(prompt + reply, len(prompt), NUM_TOKENS, seeds if temperature > 0 else torch.zeros_like(seeds)))
    return texts


def overfitted(target: FrozenTarget, method: Method, texts: list[Text]) -> Head:
    """A new head that has learnt these very texts."""
    torch.manual_seed(0)
    ids = [torch.tensor(text.token_ids) for text in texts]
    examples = [Example(one.int(), torch.ones(len(one), dtype=torch.bool)) for one in ids]
    settings = TrainSettings(target.path, (), Path(), method, draft_vocab=VOCAB * 3 // 4)
    head = new_head(target, settings, examples)[0]
    overfit(head, target, texts)
    return head


def overfit(head: Head, target: FrozenTarget, texts: list[Text]) -> None:
    """Teach a head these texts."""
    objective = Objective(head, target.lm_head, LossWeights(0.0, 1.0, noise=0.0, num_steps=3), target.finish)
    optimizer = torch.optim.Adam([p for p in head.parameters() if p.requires_grad], lr=2e-3)
    batches = [(read.token_ids, read.features) for read in read_texts(target, texts, aux_layers(head.config))]
    for _ in range(NUM_PASSES):
        for token_ids, features in batches:
            mask = torch.ones_like(token_ids, dtype=torch.bool)
            optimizer.zero_grad()
            objective(token_ids, mask, features).loss.backward()
            optimizer.step()
    head.eval()


def expected_tau(target: FrozenTarget, head: Head, texts: list[Text], temperature: float, window: int = 0) -> float:
    """As `vllm-eagle eval` computes it."""
    tree = TreeConfig.from_options(NUM_DRAFT_TOKENS, {"draft_window": window})
    return replay(head, read_texts(target, texts, aux_layers(head.config)), tree, temperature).tau
