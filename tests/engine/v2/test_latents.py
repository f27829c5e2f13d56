"""Targets with latent attention (MLA) in the V2 engine: vLLM's TRITON_MLA with tree rows, through Triton's interpreter.

What multiplies the latents of prompts out is vLLM's own for CPUs.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.engine.families import FFN, HEADS, HIDDEN, VOCAB, half_known
from tests.engine.test_targets import knowing_head
from tests.engine.v2.bed import Answers, Bed, Case
from tests.tiers import interpreted
from vllm_eagle.bench.engines.drafters import ours

PROMPTS = [[3 + (7 * i + 5 * j) % 250 for j in range(length)] for i, length in enumerate((5, 70, 40, 33))]


def random_target(folder: Path) -> Path:
    """Of DeepSeek-V3's kind, without experts."""
    torch.manual_seed(8)
    config = transformers.DeepseekV3Config(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=3, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        vocab_size=VOCAB, q_lora_rank=48, kv_lora_rank=256, qk_rope_head_dim=64, qk_nope_head_dim=32, v_head_dim=32,
        first_k_dense_replace=3, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=64,
        max_position_embeddings=512, initializer_range=0.2, bos_token_id=0, eos_token_id=1, num_nextn_predict_layers=0,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config)
    half_known(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(bed: Bed, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Answers]:
    """Greedy and sampled, more requests than run at a time; prompts come in pieces, of which the last are short."""
    target = random_target(tmp_path_factory.mktemp("latent") / "target")
    params = [{"temperature": float(i % 2), "seed": i, "max_tokens": 24, "ignore_eos": True, "detokenize": False} for i in range(4)]
    engine: dict[str, Any] = {"skip_tokenizer_init": True, "max_num_seqs": 3, "max_num_batched_tokens": 48}
    # vLLM's operator for CPUs turns slices of a query wrongly, another way for every number of rows; by torch it is as on a GPU.
    engine["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
    asked = Case(str(target), PROMPTS, params, engine=engine, attention="stock")
    return asked, bed.run(asked)


def with_trees(asked: Case, tmp_path: Path, **options: object) -> Case:
    trees = ours(str(knowing_head(tmp_path / "head")), 8, **({"budget": False, "topk": 3, "max_depth": 3} | options))
    return replace(asked, engine=asked.engine | trees, attention="triton")


@interpreted
@pytest.mark.parametrize("is_async", [True, False])
def test_tokens_are_those_of_plain_decoding(bed: Bed, plain: tuple[Case, Answers], is_async: bool, tmp_path: Path) -> None:
    asked, expected = plain
    found = bed.run(replace(with_trees(asked, tmp_path), is_async=is_async))
    assert found.token_ids == expected.token_ids
    assert found.stats["tau"] > 1.1
    assert found.stats["num_moved"] > 0
    assert len({token for answer in expected.token_ids for token in answer}) > 10


@interpreted
def test_the_same_with_a_budget(bed: Bed, plain: tuple[Case, Answers], tmp_path: Path) -> None:
    """How many nodes of a tree are verified is decided on the device."""
    asked, expected = plain
    found = bed.run(replace(with_trees(asked, tmp_path, budget=True), is_async=True, patches=("nodes_cost",)))
    assert found.token_ids == expected.token_ids
    assert found.stats["num_moved"] > 0


@interpreted
def test_the_same_captured(bed: Bed, plain: tuple[Case, Answers], tmp_path: Path) -> None:
    """Passes of decoding requests and drafting are replayed."""
    asked, expected = plain
    found = bed.run(replace(with_trees(asked, tmp_path), is_async=True, capture_sizes=(3, 27)))
    assert found.token_ids == expected.token_ids
    assert found.stats["num_moved"] > 0
    assert found.stats["graphs"]["replayed"] > found.stats["num_passes"]


@interpreted
@pytest.mark.parametrize("broken", ["no_compaction", "causal_trees"])
def test_what_is_broken_is_noticed(bed: Bed, plain: tuple[Case, Answers], broken: str, tmp_path: Path) -> None:
    asked, expected = plain
    assert bed.run(replace(with_trees(asked, tmp_path), patches=(broken,))).token_ids != expected.token_ids
