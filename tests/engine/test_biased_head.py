"""A head as SafeAILab publishes them for LLaMA-2, fc.bias and all, drafts trees in vLLM."""

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import ModelRegistry, SamplingParams
from vllm.model_executor.models.llama_eagle import EagleLlamaForCausalLM
from vllm.v1.spec_decode.eagle import EagleProposer

from tests.engine.engines import engine, generate, tokens, tree_stats, trees
from tests.heads import heads
from vllm_eagle import plugin
from vllm_eagle.engine.biased_head import EagleBiasedLlamaForCausalLM
from vllm_eagle.heads import served
from vllm_eagle.heads.formats import BIASED_ARCHITECTURE

LIKED = 77
PROMPTS = [[5, 9, 200, 31], [7], list(range(40, 90))]


def head_that_its_bias_decides(target: Path, folder: Path) -> Path:
    """All weights that could add to the feature are zero but fc.bias, a multiple of token 77's row in the target's LM head:
    whatever came before, the head's best next token is 77. Without the bias all its logits are zero.
    """
    from safetensors.torch import load_file

    weights = heads.eagle1_weights(torch.float32, qkv_bias=True)
    for name in ("fc.weight", "layers.0.self_attn.o_proj.weight", "layers.0.mlp.down_proj.weight"):
        weights[name].zero_()
    weights["fc.bias"] = 2 * load_file(target / "model.safetensors")["lm_head.weight"][LIKED]
    return heads.write(folder, heads.eagle1_settings(), weights, pickled=True)


def loaded(worker: Any) -> dict[str, Any]:
    drafter: EagleProposer = worker.model_runner.drafter
    attention = drafter.model.model.layers[0].self_attn
    return {
        "class": type(drafter.model),
        "bias": drafter.model.model.fc.bias.clone(),
        "qkv_bias": attention.qkv_proj.bias.clone(),
        "o_bias": attention.o_proj.bias,
        "own_embedding": drafter.model.has_own_embed_tokens,
    }


def test_a_head_as_safeailab_publishes_it_drafts_with_its_bias(
    random_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "cache", lambda: tmp_path / "cache")
    target = random_models["target"]
    source = head_that_its_bias_decides(target, tmp_path / "theirs")
    params = [SamplingParams(temperature=t, seed=i, max_tokens=24, ignore_eos=True) for i, t in enumerate((0.0, 1.0, 0.7))]
    always = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logit_bias={LIKED: 1000.0})
    with engine(target) as llm:
        plain = tokens(generate(llm, PROMPTS, params))
    with engine(target, **trees(source, 8)) as llm:
        assert tokens(generate(llm, PROMPTS, params)) == plain
        found = llm.collective_rpc(loaded)[0]
        before = tree_stats(llm)
        assert tokens(generate(llm, PROMPTS, always)) == [[[LIKED] * 40]] * len(PROMPTS)
        after = tree_stats(llm)

    weights = torch.load(source / "pytorch_model.bin", weights_only=True)
    assert found["class"] is EagleBiasedLlamaForCausalLM
    assert torch.equal(found["bias"], weights["fc.bias"])
    assert torch.equal(found["qkv_bias"], torch.cat([weights[f"layers.0.self_attn.{part}_proj.bias"] for part in "qkv"]))
    assert found["o_bias"] is None
    assert found["own_embedding"]
    # 40 tokens per prompt, the first from the prompt's own pass: where the target wants 77 and nothing else, the head drafts it
    # to the depth of its trees.
    verified = after["num_verifications"] - before["num_verifications"]
    assert (after["num_accepted"] - before["num_accepted"]) / verified > 6


def test_the_class_is_added_to_vllms_and_replaces_none() -> None:
    plugin.register()
    added = ModelRegistry.models[BIASED_ARCHITECTURE]
    plugin.register()
    assert ModelRegistry.models[BIASED_ARCHITECTURE] is added
    assert added.load_model_cls() is EagleBiasedLlamaForCausalLM
    stock = ModelRegistry.models["EagleLlamaForCausalLM"].load_model_cls()
    assert stock is EagleLlamaForCausalLM
    assert stock is not EagleBiasedLlamaForCausalLM


def test_a_bias_that_is_promised_must_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EagleLlamaForCausalLM, "load_weights", lambda self, weights: list(weights))
    model = object.__new__(EagleBiasedLlamaForCausalLM)
    model.load_weights([("fc.weight", torch.ones(1)), ("fc.bias", torch.ones(1))])
    with pytest.raises(ValueError, match=r"names a class with fc.bias, the weights have none; convert the head again"):
        model.load_weights([("fc.weight", torch.ones(1))])
