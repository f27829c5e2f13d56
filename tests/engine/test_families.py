"""Heads for other families than Llama: made by the trainer, served by vLLM with trees, tokens as without."""

from pathlib import Path

import pytest
import torch
import transformers
from vllm import SamplingParams

from tests.engine.engines import engine, generate, tokens, tree_stats, trees
from tests.tiers import some
from vllm_eagle.train.data.examples import Example
from vllm_eagle.train.features.target import FrozenTarget
from vllm_eagle.train.head.files import save_head
from vllm_eagle.train.run.build import new_head
from vllm_eagle.train.run.settings import DEFAULT_WEIGHTS, Method, TrainSettings

VOCAB = 256


def random_target(folder: Path, family: str) -> Path:
    """A random model of the family, with logits far enough apart for exact comparisons."""
    torch.manual_seed(8)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": VOCAB}
    sizes |= {"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1}
    config = getattr(transformers, f"{family}Config")(**sizes, initializer_range=0.2, tie_word_embeddings=False)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "method"),
    some([("Qwen2", "eagle"), ("Qwen3", "eagle3"), ("Mistral", "eagle3")], ("Qwen2", "eagle"), ("Qwen3", "eagle3")),
)
def test_served_with_trees(tmp_path: Path, family: str, method: Method) -> None:
    path = random_target(tmp_path / "target", family)
    target = FrozenTarget(path, torch.float32)
    everything = [Example(torch.arange(VOCAB).int(), torch.ones(VOCAB, dtype=torch.bool))]
    settings = TrainSettings(str(path), (), tmp_path, method, DEFAULT_WEIGHTS[method], draft_vocab=128)
    save_head(new_head(target, settings, everything)[0], tmp_path / "head", torch.float32)
    prompts = [list(range(10 + i, 30 + 3 * i)) for i in range(4)]
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=24, ignore_eos=True, detokenize=False) for i in range(4)]
    with engine(path, skip_tokenizer_init=True) as llm:
        plain = tokens(generate(llm, prompts, params))
    with engine(path, skip_tokenizer_init=True, **trees(tmp_path / "head", 16)) as llm:
        assert tokens(generate(llm, prompts, params)) == plain
        assert tree_stats(llm)["num_verifications"] > 0
