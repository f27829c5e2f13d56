"""MTP modules, which lie in the target's checkpoint: MiMo's drafts trees, others are refused before anything is loaded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

from tests.engine import test_targets, test_windows
from tests.engine.engines import ENGINE, engine, generate, tokens, tree_stats
from tests.engine.families import HIDDEN
from tests.tiers import exhaustive

TREES = {"spec_method": "mtp", "spec_tokens": 16, "additional_config": {"vllm_eagle": {"budget": False}}}

CHAINS = TREES | {"spec_tokens": 4, "additional_config": {"vllm_eagle": {"budget": False, "mode": "chain"}}}


def with_module(target: Path) -> Path:
    """Make MiMo of a Qwen2, which it is but for the module: one that foretells the embedding of the token as the next feature."""
    settings = json.loads((target / "config.json").read_text())
    settings |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    (target / "config.json").write_text(json.dumps(settings))
    weights = load_file(target / "model.safetensors")
    layer, module = "model.layers.0.", "model.mtp_layers.0."
    weights |= {name.replace(layer, module): x.clone() for name, x in weights.items() if name.startswith(layer)}
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"{module}{name}.weight"].zero_()
    for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        weights[f"{module}{name}.weight"] = torch.ones(HIDDEN)
    weights[f"{module}input_proj.weight"] = torch.cat([torch.zeros(HIDDEN, HIDDEN), torch.eye(HIDDEN)], dim=1)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@exhaustive
@pytest.mark.parametrize("knows", [True, False])
def test_trees_of_mimos_module_are_exact(knows: bool, tmp_path: Path) -> None:
    """Of a target that its module knows, of whose chains hardly a node is rejected then, and of one that it half knows, so that
    branches are accepted; greedy and sampled.
    """
    if knows:
        target = with_module(test_targets.random_target(tmp_path / "target", "Qwen2"))
    else:
        target = with_module(test_windows.random_target(tmp_path / "target", "Qwen2", use_sliding_window=False))
    prompts = [[3 + (7 * i + 5 * j) % 250 for j in range(length)] for i, length in enumerate((5, 70, 130, 33))]
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=60, ignore_eos=True, detokenize=False) for i in range(4)]
    with engine(target, skip_tokenizer_init=True) as llm:
        plain = tokens(generate(llm, prompts, params))
    with engine(target, skip_tokenizer_init=True, **(CHAINS if knows else TREES)) as llm:
        assert tokens(generate(llm, prompts, params)) == plain
        stats = tree_stats(llm)
    print("MTP", stats["tau"], stats["num_moved"])
    assert stats["tau"] > (4.6 if knows else 1.1)
    assert knows or stats["num_moved"] > 0


def refused(target: Path, **changes: object) -> str:
    with pytest.raises(ValueError, match=r"MTP|mtp") as refusal:
        EngineArgs(model=str(target), **{**ENGINE, "skip_tokenizer_init": True, **TREES, **changes}).create_engine_config()
    return str(refusal.value)


def test_a_model_beside_a_module_is_refused(random_models: dict[str, Path]) -> None:
    words = f"drafts with a module of the target itself, got the model {random_models['eagle']}; remove it"
    assert words in refused(random_models["target"], spec_model=str(random_models["eagle"]))
