"""Targets besides Llama: those that are served are exact, and drafted for as they are; others are refused before loading."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

from tests.engine.engines import ENGINE, engine, generate, tokens, tree_stats, trees
from tests.engine.families import FFN, HEADS, HIDDEN, KV_HEADS, TARGETS, VOCAB, even_embedding, model_of
from tests.heads import heads
from tests.tiers import some
from vllm_eagle.train.features.target import FrozenTarget
from vllm_eagle.train.head.files import load_head

NUM_CHAIN_TOKENS, NUM_STEPS = 4, 5


def random_target(folder: Path, family: str) -> Path:
    """A model whose layers add nothing: its feature after a token is that token's embedding, all of one length, normalized."""
    model = model_of(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Nemotron's norms multiply with one more than they store, which transformers begins with one.
            if "o_proj" in name or "down_proj" in name or (family == "Nemotron" and "norm" in name):
                parameter.zero_()
        even_embedding(model)
    model.save_pretrained(folder)
    return folder


def knowing_head(folder: Path, vocab_size: int = VOCAB) -> Path:
    """A head that foretells such a target's feature: it hands on the embedding of the token."""
    weights = heads.eagle1_weights(torch.float32, fc_bias=False)
    weights = {name: value for name, value in weights.items() if name != "embed_tokens.weight"}
    weights["fc.weight"] = torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)], dim=1)
    for name in ("layers.0.self_attn.o_proj.weight", "layers.0.mlp.down_proj.weight"):
        weights[name].zero_()
    return heads.write(folder, heads.eagle1_settings(vocab_size=vocab_size, architectures=["EagleLlamaForCausalLM"]), weights)


@pytest.mark.usefixtures("full_noise")
@pytest.mark.parametrize("family", some(TARGETS, "Gemma2", "Granite"))
def test_drafts_are_the_targets_own(family: str, tmp_path: Path) -> None:
    """At T = 1 a chain is accepted to its end in every step only if the head's distribution is the target's: embedding, LM head,
    scales and caps.
    """
    target, head = random_target(tmp_path / "target", family), knowing_head(tmp_path / "head")
    prompts = [list(range(10 + i, 30 + 3 * i)) for i in range(4)]
    length = 1 + NUM_STEPS * (NUM_CHAIN_TOKENS + 1)
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=length, ignore_eos=True, detokenize=False) for i in range(4)]
    with engine(target, skip_tokenizer_init=True) as llm:
        plain = tokens(generate(llm, prompts, params))
    with engine(target, skip_tokenizer_init=True, **trees(head, NUM_CHAIN_TOKENS, mode="chain")) as llm:
        assert tokens(generate(llm, prompts, params)) == plain
        assert tree_stats(llm)["tau"] > NUM_CHAIN_TOKENS + 0.8
    assert len({token for [answer] in plain for token in answer}) > 10


@pytest.mark.parametrize("family", ["Gemma", "Qwen3"])
def test_eval_sees_the_embedding_that_vllm_shares(family: str, tmp_path: Path) -> None:
    """Gemma scales its embedding; vLLM shares the table without that, and so must training and evaluation."""
    target = FrozenTarget(random_target(tmp_path / "target", family), torch.float32)
    head = load_head(knowing_head(tmp_path / "head"), target)
    ids = torch.arange(2, 40)[None]
    assert torch.allclose(head.embed(ids), target.features(ids).last, atol=1e-3)


def refusal(target: Path, head: Path, **changes: Any) -> str:
    """Why the configuration is refused; nothing is loaded for that."""
    arguments = {**ENGINE, "skip_tokenizer_init": True, **trees(head), **changes}
    with pytest.raises(ValueError, match=r"target|model") as refused:
        EngineArgs(model=str(target), **arguments).create_engine_config()
    return str(refused.value)


def test_no_eagle3_for_classes_that_hand_out_no_features(tmp_path: Path) -> None:
    """And whose layers are not listened to."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": 4, "num_attention_heads": HEADS}
    config = transformers.Ernie4_5_MoeConfig(**sizes, vocab_size=VOCAB, num_key_value_heads=KV_HEADS, moe_num_experts=4)
    transformers.Ernie4_5_MoeForCausalLM(config).save_pretrained(tmp_path / "target")
    weights = heads.eagle3_weights("layers.0.", torch.float32)
    weights |= {"d2t": torch.zeros(128, dtype=torch.long), "t2d": torch.arange(VOCAB) < 128}
    weights["lm_head.weight"] = weights["lm_head.weight"][:128].contiguous()
    settings = heads.eagle3_settings(vocab_size=VOCAB, draft_vocab_size=128, eagle_aux_hidden_state_layer_ids=[1, 2, 3])
    head = heads.write(tmp_path / "head", settings, weights)
    words = "is a Ernie4_5_MoeForCausalLM, of whose layers vLLM hands no features to an EAGLE-3 head"
    assert words in refusal(tmp_path / "target", head)


@pytest.mark.parametrize(
    ("family", "words"),
    [("GPT2", "embedding in transformer.wte.weight"), ("OPT", "embedding in model.decoder.embed_tokens.weight")],
)
def test_targets_that_keep_their_embedding_elsewhere_are_refused(family: str, words: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 512}
    if family == "GPT2":
        sizes |= {"n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS}
    else:
        sizes |= {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS, "ffn_dim": FFN}
        sizes |= {"word_embed_proj_dim": HIDDEN}
    name = {"GPT2": "GPT2LMHeadModel", "OPT": "OPTForCausalLM"}[family]
    getattr(transformers, name)(getattr(transformers, f"{family}Config")(**sizes)).save_pretrained(tmp_path / "target")
    assert words in refusal(tmp_path / "target", knowing_head(tmp_path / "head"))


_SIZES = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
# Class in transformers: what its layers are.
RECURRENT: dict[str, dict[str, Any]] = {
    "Qwen3Next": {"num_hidden_layers": 4, "num_experts": 4, "head_dim": 32},  # three of linear attention, one of full attention
    "Bamba": {"num_hidden_layers": 4, "attn_layer_indices": [3], "mamba_n_heads": 8, "mamba_d_head": 32},
    "FalconH1": {"num_hidden_layers": 4, "head_dim": 32},  # both in each layer
    "Mamba2": {"num_hidden_layers": 4, "num_heads": 8, "head_dim": 32},
}


@pytest.mark.parametrize("family", RECURRENT)
def test_a_recurrent_state_is_refused_by_name(family: str, tmp_path: Path) -> None:
    """There is nothing to load here but config.json."""
    config = getattr(transformers, f"{family}Config")(**_SIZES | {"vocab_size": VOCAB} | RECURRENT[family])
    config.architectures = [f"{family}ForCausalLM"]
    config.save_pretrained(tmp_path / "target")
    words = "keeps a recurrent state (Mamba or linear attention), which cannot branch; remove the draft-tree options"
    assert words in refusal(tmp_path / "target", knowing_head(tmp_path / "head"))
