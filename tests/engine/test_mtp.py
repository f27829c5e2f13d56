"""MTP modules, which lie in the target's checkpoint: those with a layer of ordinary attention draft trees, others are refused
before anything is loaded.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

from tests.engine.engines import ENGINE, engine, generate, tokens, tree_stats
from tests.engine.families import HIDDEN, even_embedding, model_of
from tests.tiers import some

TREES = {"spec_method": "mtp", "spec_tokens": 16, "additional_config": {"vllm_eagle": {"budget": False}}}

CHAINS = TREES | {"spec_tokens": 4, "additional_config": {"vllm_eagle": {"budget": False, "mode": "chain"}}}


@dataclass(frozen=True)
class Module:
    """Where a family keeps its module, and what that is made of; `{}` stands for each of its other tensors."""

    family: str  # class in transformers
    layer: int  # of the target, which is like the module's
    copy: str  # how the names of that layer's copy begin
    own: str  # names of the others
    norms: tuple[str, ...]
    projection: str
    embedding_first: bool = True  # which the projection takes before the feature
    settings: dict[str, Any] = field(default_factory=dict)


_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
MODULES = {
    "MiMo": Module(
        "Qwen2", 0, "model.mtp_layers.0.", "model.mtp_layers.0.{}.weight",
        ("token_layernorm", "hidden_layernorm", "final_layernorm"), "input_proj", embedding_first=False,
        settings={"use_sliding_window": False},
    ),
    "Glm4Moe": Module(
        "Glm4Moe", 3, "model.layers.4.", "model.layers.4.{}.weight", ("enorm", "hnorm", "shared_head.norm"), "eh_proj",
        settings={**_EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 2, "pad_token_id": 0},
    ),
    "Ernie4_5_Moe": Module(
        "Ernie4_5_Moe", 0, "model.mtp_block.0.", "model.{}.0.weight", ("mtp_emb_norm", "mtp_hidden_norm"), "mtp_linear_proj",
        settings={"moe_k": 2, "moe_num_experts": 4, "moe_intermediate_size": 64, "tie_word_embeddings": False},
    ),
    "ExaoneMoe": Module(
        "ExaoneMoe", 0, "mtp.layers.0.", "mtp.{}.weight", ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"), "fc",
        settings={**_EXPERTS, "num_experts": 4, "sliding_window": 24},
    ),
    "HYV3": Module(
        "HYV3", 3, "model.layers.4.", "model.layers.4.{}.weight", ("enorm", "hnorm", "final_layernorm"), "eh_proj",
        settings={
            **_EXPERTS, "num_experts": 4, "first_k_dense_replace": 1, "expert_hidden_dim": 64, "route_norm": True, "qk_norm": True,
            "pad_token_id": 0,
        },
    ),
}  # fmt: skip


def target_with_module(folder: Path, name: str, knows: bool) -> Path:
    """A random target whose layers add a little to the token's embedding, or nothing, so that its module `knows` the next feature:
    it foretells the embedding of the token.
    """
    module = MODULES[name]
    model = model_of(module.family, **module.settings)
    with torch.no_grad():
        for tensor, parameter in model.named_parameters():
            if "o_proj" in tensor or "down_proj" in tensor:
                parameter *= 0.0 if knows else 0.5 if "o_proj" in tensor else 0.02 if "experts" in tensor else 0.0
        even_embedding(model)
    model.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"architectures": [f"{name}ForCausalLM"], "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(settings))
    weights = load_file(folder / "model.safetensors")
    layer = f"model.layers.{module.layer}."
    copies = {module.copy + key.removeprefix(layer): x.clone() for key, x in weights.items() if key.startswith(layer)}
    for key, x in copies.items():
        if "o_proj" in key or "down_proj" in key:
            x.zero_()
    weights |= copies | {module.own.format(norm): torch.ones(HIDDEN) for norm in module.norms}
    halves = [torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)]
    weights[module.own.format(module.projection)] = torch.cat(halves if module.embedding_first else halves[::-1], dim=1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


CASES = [(name, knows) for name in MODULES for knows in (True, False)]


@pytest.mark.parametrize(("name", "knows"), some(CASES))
def test_trees_of_a_module_are_exact(name: str, knows: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Of a target that its module knows, of whose chains hardly a node is rejected then, and of one that it half knows, so that
    branches are accepted; greedy and sampled.
    """
    if knows:
        request.getfixturevalue("full_noise")
    target = target_with_module(tmp_path / "target", name, knows)
    prompts = [[3 + (7 * i + 5 * j) % 250 for j in range(length)] for i, length in enumerate((5, 70, 130, 33))]
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=60, ignore_eos=True, detokenize=False) for i in range(4)]
    with engine(target, skip_tokenizer_init=True) as llm:
        plain = tokens(generate(llm, prompts, params))
    with engine(target, skip_tokenizer_init=True, **(CHAINS if knows else TREES)) as llm:
        assert tokens(generate(llm, prompts, params)) == plain
        stats = tree_stats(llm)
    print("MTP", name, stats["tau"], stats["num_moved"])
    assert stats["tau"] > (4.6 if knows else 1.1)
    assert knows or stats["num_moved"] > 0


def refused(target: Path, **changes: object) -> str:
    with pytest.raises(ValueError, match=r"MTP|mtp") as refusal:
        EngineArgs(model=str(target), **{**ENGINE, "skip_tokenizer_init": True, **TREES, **changes}).create_engine_config()
    return str(refusal.value)


def test_a_model_beside_a_module_is_refused(random_models: dict[str, Path]) -> None:
    words = f"drafts with a module of the target itself, got the model {random_models['eagle']}; remove it"
    assert words in refused(random_models["target"], spec_model=str(random_models["eagle"]))


def test_a_module_with_latent_attention_is_refused_by_name(tmp_path: Path) -> None:
    """There is hardly anything to load here but config.json."""
    config = transformers.DeepseekV3Config(
        hidden_size=HIDDEN, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=256, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, q_lora_rank=None,
        num_nextn_predict_layers=1,
    )  # fmt: skip
    config.architectures = ["DeepseekV3ForCausalLM"]
    config.save_pretrained(tmp_path)
    save_file({"nothing": torch.zeros(1)}, tmp_path / "model.safetensors")
    words = refused(tmp_path)
    assert "its MTP module, DeepSeekMTPModel, has no tree here" in words
    assert "uses multi-head latent attention (MLA)" in words
