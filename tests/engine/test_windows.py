"""Targets with sliding windows, capped scores and attention sinks, and windows over the head: windows go by depth, and trees are
exact beside freed blocks.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from tests.engine.engines import engine, generate, tokens, tree_stats, trees
from tests.engine.families import even_embedding, model_of, overfit
from tests.engine.test_targets import knowing_head
from tests.tiers import some
from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.evaluate.simulate import replay
from vllm_eagle.evaluate.texts import read_texts, write_answers
from vllm_eagle.train.features.target import FrozenTarget
from vllm_eagle.train.head.files import load_head, save_head
from vllm_eagle.train.head.models import aux_layers

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


def random_target(folder: Path, family: str, **changes: Any) -> Path:
    """Layers that add a little to the token's embedding: enough that attention decides, so little that drafts are right."""
    model = model_of(family, pad_token_id=0, **TARGETS[family] | changes)
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


@pytest.mark.parametrize("kind", some(["eagle", "eagle3"], "eagle3"))
def test_a_window_over_the_head_changes_its_drafts_alone(random_models: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """First pass and levels go by it, in prompts that come in pieces, too: tau is what `eval` says with such a window, and not what
    it says without. Tokens are the target's, also when its blocks are found in the prefix cache.
    """
    target = FrozenTarget(random_models["target"], torch.float32)
    prompts = [[3 + (7 * i + 5 * j) % 500 for j in range(length)] for i, length in enumerate((130, 61, 95, 112))]
    texts = write_answers(target, prompts, 40, 9, temperature=1.0)
    head = load_head(random_models[kind], target)
    overfit(head, target, texts)
    save_head(head, tmp_path / "head", torch.float32)
    config = TreeConfig.from_options(16, {"draft_window": WINDOW})
    batches = list(read_texts(target, texts, aux_layers(head.config)))
    expected = replay(head, batches, config, temperature=1.0).tau
    assert abs(expected - replay(head, batches, TreeConfig(16), temperature=1.0).tau) > 0.1 * expected
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=40, ignore_eos=True) for i in range(len(prompts))]
    options = trees(tmp_path / "head", 16, draft_window=WINDOW) | {"max_num_batched_tokens": 96, "max_num_seqs": 4}
    with engine(random_models["target"], **options) as llm:
        for _ in range(2):
            llm.collective_rpc("reset_eagle_stats")
            assert tokens(generate(llm, prompts, params)) == [[text.token_ids[text.num_prompt :][:40]] for text in texts]
            assert tree_stats(llm)["tau"] == pytest.approx(expected, rel=0.03)
