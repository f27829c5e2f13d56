"""Tiny random models for tests: a Llama target with a byte-like tokenizer, an EAGLE-1 head and an EAGLE-3 head."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN = 512, 128, 4, 4, 2, 32, 256


def llama_settings(**changes: object) -> dict[str, object]:
    """config.json of the target."""
    settings: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": FFN,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "float32",
    }
    return settings | changes


def _write(folder: Path, settings: dict[str, object], weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *alphabet, *(f"<{i}>" for i in range(VOCAB - 2 - len(alphabet)))]
    bpe = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _linear(generator: torch.Generator, out: int, into: int, gain: float = 1.0) -> torch.Tensor:
    return torch.randn(out, into, generator=generator) * gain / into**0.5


def _layer(generator: torch.Generator, prefix: str, attention_input: int = HIDDEN) -> dict[str, torch.Tensor]:
    weights = {
        "self_attn.q_proj": _linear(generator, HEADS * HEAD_DIM, attention_input, 2.0),
        "self_attn.k_proj": _linear(generator, KV_HEADS * HEAD_DIM, attention_input, 2.0),
        "self_attn.v_proj": _linear(generator, KV_HEADS * HEAD_DIM, attention_input),
        "self_attn.o_proj": _linear(generator, HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj": _linear(generator, FFN, HIDDEN),
        "mlp.up_proj": _linear(generator, FFN, HIDDEN),
        "mlp.down_proj": _linear(generator, HIDDEN, FFN),
        "post_attention_layernorm": torch.ones(HIDDEN),
    }
    return {f"{prefix}{name}.weight": weight for name, weight in weights.items()}


def random_target(folder: Path, **changes: object) -> Path:
    """A target whose next token depends on the whole context, with sampled text that does not repeat itself at once."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN, generator=generator),
        "lm_head.weight": _linear(generator, VOCAB, HIDDEN, 3.0),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    for i in range(LAYERS):
        weights |= _layer(generator, f"model.layers.{i}.")
        weights[f"model.layers.{i}.input_layernorm.weight"] = torch.ones(HIDDEN)
    _write(folder, llama_settings(**changes), weights)
    _tokenizer(folder)
    return folder


def random_eagle1_head(folder: Path, **changes: object) -> Path:
    """An EAGLE-1 head that has learnt nothing: its drafts are accepted by chance only."""
    generator = torch.Generator().manual_seed(1)
    weights = _layer(generator, "layers.0.") | {"fc.weight": _linear(generator, HIDDEN, 2 * HIDDEN)}
    return _write(folder, llama_settings(num_hidden_layers=1, **changes), weights)


def random_eagle3_head(folder: Path, draft_vocab: int = 256, **changes: object) -> Path:
    """An EAGLE-3 head with a reduced draft vocabulary: every second token of the target's."""
    generator = torch.Generator().manual_seed(2)
    weights = _layer(generator, "midlayer.", 2 * HIDDEN) | {
        "midlayer.hidden_norm.weight": torch.ones(HIDDEN),
        "midlayer.input_layernorm.weight": torch.ones(HIDDEN),
        "norm.weight": torch.ones(HIDDEN),
        "fc.weight": _linear(generator, HIDDEN, 3 * HIDDEN),
        "lm_head.weight": _linear(generator, draft_vocab, HIDDEN, 3.0),
        "d2t": torch.arange(draft_vocab),  # target id = draft id + d2t[draft id] = 2 * draft id
        "t2d": torch.arange(VOCAB) % 2 == 0,
    }
    settings = llama_settings(
        architectures=["LlamaForCausalLMEagle3"],
        num_hidden_layers=1,
        draft_vocab_size=draft_vocab,
        eagle_aux_hidden_state_layer_ids=[1, 2, 3],
        **changes,
    )
    return _write(folder, settings, weights)


def with_markers(model: Path, folder: Path, *markers: str) -> Path:
    """A copy of a model whose tokenizer has these as tokens of their own: its last tokens that are part of no other, renamed."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    for marker in markers:
        parts = {part for merge in merges for part in merge}
        place = max(i for i, merge in enumerate(merges) if "".join(merge) not in parts)
        vocabulary[marker] = vocabulary.pop("".join(merges.pop(place)))
        added = {"id": vocabulary[marker], "content": marker, "single_word": False, "lstrip": False, "rstrip": False}
        tokenizer["added_tokens"].append(added | {"normalized": False, "special": False})
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder
