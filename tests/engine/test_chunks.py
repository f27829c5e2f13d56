"""Llama 4: some layers attend to chunks of the context, others to all of it, without rotation; experts."""

from pathlib import Path

import torch
import transformers
from vllm import SamplingParams

from tests.engine.engines import engine, generate, tokens, tree_stats, trees
from tests.engine.families import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCAB, half_known
from tests.engine.test_targets import knowing_head, refusal
from tests.tiers import exhaustive

CHUNK = 512


def random_target(folder: Path) -> Path:
    """Of Llama 4's kind, with experts in every other layer."""
    torch.manual_seed(8)
    config = transformers.Llama4TextConfig(
        hidden_size=HIDDEN, intermediate_size=64, intermediate_size_mlp=FFN, num_hidden_layers=4, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, vocab_size=VOCAB, num_local_experts=4, interleave_moe_layer_step=2,
        attention_chunk_size=CHUNK, max_position_embeddings=2 * CHUNK, floor_scale=64, initializer_range=0.2, bos_token_id=0,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Llama4ForCausalLM(config).float()
    half_known(model)
    model.save_pretrained(folder)
    return folder


@exhaustive
def test_trees_are_exact_in_one_chunk(tmp_path: Path) -> None:
    target, head = random_target(tmp_path / "target"), knowing_head(tmp_path / "head")
    prompts = [[3 + (7 * i + 5 * j) % 250 for j in range(length)] for i, length in enumerate((5, 70, 130, 440))]
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=60, ignore_eos=True, detokenize=False) for i in range(4)]
    with engine(target, max_model_len=CHUNK, skip_tokenizer_init=True) as llm:
        plain = tokens(generate(llm, prompts, params))
    with engine(target, max_model_len=CHUNK, skip_tokenizer_init=True, **trees(head, 16)) as llm:
        assert tokens(generate(llm, prompts, params)) == plain
        stats = tree_stats(llm)
    print("Llama 4", stats["tau"], stats["num_moved"])
    assert stats["num_moved"] > 0  # branches off the first child were accepted
    assert stats["tau"] > 1.1


def test_more_than_one_chunk_is_refused(tmp_path: Path) -> None:
    target, head = random_target(tmp_path / "target"), knowing_head(tmp_path / "head")
    assert f"set max_model_len, now {CHUNK + 1}, to {CHUNK}" in refusal(target, head, max_model_len=CHUNK + 1)
