"""Targets with sliding windows, capped scores and attention sinks: windows go by depth, and trees are exact beside freed blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from tests.engine.engines import engine, generate, tokens, tree_stats, trees
from tests.engine.families import even_embedding, model_of
from tests.engine.test_targets import knowing_head
from tests.tiers import some

WINDOW = 24
_GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": WINDOW}
# Class in transformers: what makes its attention special.
TARGETS: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": WINDOW},
    "Qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
    "Gemma2": {**_GEMMA, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 5.0},
    "Gemma3": {**_GEMMA, "tie_word_embeddings": False, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "Exaone4": {"sliding_window": WINDOW, "sliding_window_pattern": 2, "tie_word_embeddings": False},
    "GptOss": {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_scaling": None},
}


def random_target(folder: Path, family: str) -> Path:
    """Layers that add a little to the token's embedding: enough that attention decides, so little that drafts are right."""
    model = model_of(family, pad_token_id=0, **TARGETS[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name:
                parameter *= 0.5
            elif "down_proj" in name:
                parameter.zero_()
            elif name.endswith("sinks"):
                parameter.normal_()
        even_embedding(model)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", some(TARGETS, "Gemma2", "GptOss"))
def test_trees_are_exact_behind_windows(family: str, tmp_path: Path) -> None:
    """Contexts far longer than the window, whose blocks vLLM frees; a prompt shorter than it; greedy and sampled in one batch."""
    target, head = random_target(tmp_path / "target", family), knowing_head(tmp_path / "head")
    prompts = [[3 + (7 * i + 5 * j) % 250 for j in range(length)] for i, length in enumerate((5, 70, 130, 33))]
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=60, ignore_eos=True, detokenize=False) for i in range(4)]
    with engine(target, skip_tokenizer_init=True) as llm:
        plain = tokens(generate(llm, prompts, params))
    with engine(target, skip_tokenizer_init=True, **trees(head, 16)) as llm:
        assert tokens(generate(llm, prompts, params)) == plain
        stats = tree_stats(llm)
    assert stats["num_moved"] > 0  # branches off the first child were accepted
    assert stats["tau"] > 1.1
