"""A grown model computes what the small one does."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_eagle.bench.speed.grow import grow
from vllm_eagle.pair import TARGET


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grow(TARGET, tmp_path_factory.mktemp("grown") / "target", num_layers=9, intermediate_size=2048)


def test_features_and_logits_are_the_same(grown: Path) -> None:
    token_ids = torch.randint(2, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    small, large = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (TARGET, grown))
    assert sum(p.numel() for p in large.parameters()) > 2 * sum(p.numel() for p in small.parameters())
    with torch.inference_mode():
        one, other = (model(token_ids, output_hidden_states=True) for model in (small, large))
    torch.testing.assert_close(other.logits, one.logits, rtol=1e-4, atol=1e-4)
    for layer in range(6):  # what EAGLE-3 heads read; the last entry is the normed feature that EAGLE-1 reads
        torch.testing.assert_close(other.hidden_states[layer], one.hidden_states[layer], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.hidden_states[-1], one.hidden_states[-1], rtol=1e-4, atol=1e-4)


def test_new_weights_are_not_all_zero(grown: Path) -> None:
    """A product with zeros could be skipped; only the last factor of each new part is zero."""
    layers = AutoModelForCausalLM.from_pretrained(grown, dtype=torch.float32).model.layers
    for name in ("q_proj", "k_proj", "v_proj"):
        assert getattr(layers[-1].self_attn, name).weight.std() > 0.01
    for layer in layers:
        assert layer.mlp.gate_proj.weight[1024:].std() > 0.01
        assert layer.mlp.up_proj.weight[1024:].std() > 0.01
        assert not layer.mlp.down_proj.weight[:, 1024:].any()
    assert not layers[-1].mlp.down_proj.weight.any()
    assert not layers[-1].self_attn.o_proj.weight.any()


def test_it_is_an_ordinary_checkpoint(grown: Path) -> None:
    text = "Tom has 3 apples."
    assert AutoTokenizer.from_pretrained(grown)(text)["input_ids"] == AutoTokenizer.from_pretrained(TARGET)(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(grown).chat_template


@pytest.mark.parametrize("sizes", [{"num_layers": 5}, {"intermediate_size": 512}])
def test_what_would_shrink_is_refused(tmp_path: Path, sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least the model's, 6 and 1024"):
        grow(TARGET, tmp_path / "x", **sizes)
    assert not (tmp_path / "x").exists()


def test_the_folder_must_be_free(grown: Path) -> None:
    with pytest.raises(ValueError, match=str(grown)):
        grow(TARGET, grown)
