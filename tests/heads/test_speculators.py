"""The speculators library loads what is written here, and what it writes is read here.

speculators 0.9 is no dependency: with it come pandas and pyarrow, about 260 MB. The test runs wherever it is installed:
`pip install --no-deps -r vllm_eagle/locks/interop.lock`, beside what `bootstrap --dev` installs.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import models
from tests.heads import heads
from tests.models import HIDDEN
from vllm_eagle.heads.convert import convert
from vllm_eagle.heads.formats import read_head
from vllm_eagle.heads.inspect import inspect

pytestmark = pytest.mark.skipif(
    find_spec("speculators") is None, reason="needs speculators: pip install --no-deps -r vllm_eagle/locks/interop.lock"
)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return models.random_target(tmp_path / "target")


def assert_holds(model: torch.nn.Module, weights: heads.Weights) -> None:
    state = model.state_dict()
    for name, tensor in weights.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("num_aux", [3, 4])
def test_speculators_loads_what_is_exported(num_aux: int, attention_bias: bool, target: Path, tmp_path: Path) -> None:
    from speculators import Eagle3DraftModel

    weights = heads.eagle3_weights(num_aux=num_aux, dtype=torch.float32)
    if attention_bias:
        sizes = {"q": models.HEADS * models.HEAD_DIM, "k": models.KV_HEADS * models.HEAD_DIM, "o": HIDDEN}
        sizes["v"] = sizes["k"]
        weights |= {f"midlayer.self_attn.{name}_proj.bias": torch.rand(size) for name, size in sizes.items()}
    settings = heads.eagle3_settings(rope_theta=123456.0, rms_norm_eps=1e-4)
    source = heads.write(tmp_path / "in", settings, weights, pickled=True)
    convert(source, tmp_path / "out", "speculators", target, [0, 1, 2, 4][:num_aux])
    model = Eagle3DraftModel.from_pretrained(tmp_path / "out")
    assert_holds(model, {name.replace("midlayer.", "layers.0."): tensor for name, tensor in weights.items()})
    assert model.target_layer_ids == [0, 1, 2, 4][:num_aux]
    layer = model.config.transformer_layer_config
    assert layer.model_type == "llama"
    assert layer.rope_parameters == {"rope_type": "default", "rope_theta": 123456.0}
    assert layer.rms_norm_eps == 1e-4
    assert model.config.norm_before_residual is False
    verifier = model.config.speculators_config.verifier
    assert (verifier.name_or_path, verifier.architectures) == (str(target), ["LlamaForCausalLM"])


def speculators_head(target: Path, **changes: Any) -> Any:
    """A head as speculators makes it for training, with the target's embedding and random weights in the rest."""
    from speculators import Eagle3DraftModel, Eagle3SpeculatorConfig, SpeculatorsConfig, VerifierConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig

    layer = json.loads((target / "config.json").read_text()) | {"num_hidden_layers": 1, "rope_theta": 20000.0}
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=LlamaConfig(**{k: v for k, v in layer.items() if k != "architectures"}),
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(proposal_type="greedy", speculative_tokens=3)],
            default_proposal_method="greedy",
            verifier=VerifierConfig.from_pretrained(str(target)),
        ),
        draft_vocab_size=heads.DRAFT_VOCAB,
        **changes,
    )
    model = Eagle3DraftModel(config)
    weights = heads.eagle3_weights()
    model.load_vocab_mappings(weights["t2d"], weights["d2t"])
    model.load_verifier_weights()
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
        {"eagle_aux_hidden_state_layer_ids": [0, 1, 2, 4], "fc_norm": True, "norm_before_residual": True, "norm_output": True},
        {"eagle_aux_hidden_state_layer_ids": [1, 2, 3], "norm_before_fc": True},
    ],
)
def test_what_speculators_writes_goes_to_vllm_and_back(changes: dict[str, Any], target: Path, tmp_path: Path) -> None:
    from speculators import Eagle3DraftModel

    model = speculators_head(target, **changes)
    model.save_pretrained(tmp_path / "theirs")
    assert inspect(tmp_path / "theirs", target).items() >= {"format": "speculators", "fits_target": True, "wrong": []}.items()
    written = load_file(tmp_path / "theirs" / "model.safetensors")

    convert(tmp_path / "theirs", tmp_path / "vllm", "vllm", target, None)
    found = load_file(tmp_path / "vllm" / "model.safetensors")
    assert found.keys() == written.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in written.items())
    head = read_head(tmp_path / "vllm")
    assert list(head.aux_layers or ()) == changes["eagle_aux_hidden_state_layer_ids"]
    assert {flag for flag, value in head.norms.items() if value} == {flag for flag, value in changes.items() if value is True}

    convert(tmp_path / "vllm", tmp_path / "back", "speculators", target, None)
    back = Eagle3DraftModel.from_pretrained(tmp_path / "back")
    assert_holds(back, written)
    ours, theirs = back.config.to_dict(), model.config.to_dict()
    same = ("draft_vocab_size", "eagle_aux_hidden_state_layer_ids", "fc_norm", "norm_before_fc", "norm_before_residual")
    assert {key: ours[key] for key in (*same, "norm_output")} == {key: theirs[key] for key in (*same, "norm_output")}
    assert ours["speculators_config"]["verifier"] == theirs["speculators_config"]["verifier"]
    assert back.config.transformer_layer_config.rope_parameters == {"rope_type": "default", "rope_theta": 20000.0}
