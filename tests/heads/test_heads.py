"""Heads of every format: told apart, converted bit for bit there and back, and refused with one clear sentence."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import models
from tests.heads import heads
from tests.heads.heads import DRAFT_VOCAB
from tests.models import HIDDEN, LAYERS, VOCAB
from vllm_eagle import cli
from vllm_eagle.heads.convert import convert
from vllm_eagle.heads.formats import BIASED_ARCHITECTURE, read_head
from vllm_eagle.heads.inspect import inspect
from vllm_eagle.heads.judge import judge
from vllm_eagle.options.engine_args import engine_args
from vllm_eagle.pair import HEAD, TARGET

AUX = "eagle_aux_hidden_state_layer_ids"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


def weights_of(folder: Path) -> heads.Weights:
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    return load_file(folder / "model.safetensors")


def settings_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return loaded


def assert_same(found: heads.Weights, expected: heads.Weights) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def renamed(weights: heads.Weights) -> heads.Weights:
    return {name.replace("midlayer.", "layers.0."): tensor for name, tensor in weights.items()}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return models.random_target(tmp_path / "target")


# --- told apart ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "weights", "pickled", "kind", "form"),
    [
        (heads.eagle1_settings(), heads.eagle1_weights(), True, "EAGLE-1", "safeailab"),
        (heads.eagle1_settings(bias=False), heads.eagle1_weights(fc_bias=False), False, "EAGLE-1", "safeailab"),
        (heads.eagle1_settings(), heads.eagle1_weights(fc_bias=False), False, "EAGLE-1", "vllm"),
        (heads.eagle3_settings(), heads.eagle3_weights(), True, "EAGLE-3", "safeailab"),
        (heads.specforge_settings(None), heads.eagle3_weights(), False, "EAGLE-3", "specforge"),
        (heads.eagle3_settings(), heads.eagle3_weights("layers.0."), False, "EAGLE-3", "vllm"),
        (heads.speculators_settings(), heads.eagle3_weights("layers.0."), False, "EAGLE-3", "speculators"),
    ],
)
def test_formats_are_told_apart(
    settings: dict[str, object], weights: heads.Weights, pickled: bool, kind: str, form: str, tmp_path: Path
) -> None:
    head = read_head(heads.write(tmp_path / "head", settings, weights, pickled=pickled))
    assert (head.kind, head.format) == (kind, form)


@pytest.mark.parametrize(("pickled", "shards"), [(True, 1), (True, 3), (False, 1), (False, 3)])
def test_weights_are_read_from_any_files(pickled: bool, shards: int, tmp_path: Path) -> None:
    weights = heads.eagle1_weights()
    folder = heads.write(tmp_path / "head", heads.eagle1_settings(), weights, pickled=pickled, shards=shards)
    convert(folder, tmp_path / "out", "vllm", None, None)
    assert_same(weights_of(tmp_path / "out"), weights)


# --- there and back -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [{"type": "mrope"}, {"rope_type": "mrope"}, {"type": "mrope", "rope_type": "default"}])
def test_positions_in_three_rows_are_known_by_their_old_name(rows: dict[str, str], tmp_path: Path) -> None:
    rope = rows | {"mrope_section": [4, 6, 6]}
    head = read_head(
        heads.write(tmp_path / "head", heads.eagle1_settings(rope_scaling=rope, rope_theta=1e6), heads.eagle1_weights())
    )
    assert head.layer["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    assert judge(head, None).wrong == ()


@pytest.mark.parametrize("fc_bias", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_eagle1_goes_to_vllm_and_back(fc_bias: bool, qkv_bias: bool, tmp_path: Path) -> None:
    weights = heads.eagle1_weights(fc_bias=fc_bias, qkv_bias=qkv_bias)
    changes: dict[str, Any] = {
        "bias": None if fc_bias else False,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    source = heads.write(tmp_path / "in", heads.eagle1_settings(**changes), weights, pickled=True)
    convert(source, tmp_path / "vllm", "vllm", None, None)
    assert_same(weights_of(tmp_path / "vllm"), weights)
    found = settings_of(tmp_path / "vllm")
    assert found["architectures"] == [BIASED_ARCHITECTURE if fc_bias else "EagleLlamaForCausalLM"]
    assert (found["attention_bias"], found["qkv_bias"], found["mlp_bias"]) == (False, qkv_bias, False)
    assert "bias" not in found  # vLLM would read it as the attention's
    assert found["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}

    convert(tmp_path / "vllm", tmp_path / "back", "safeailab", None, None)
    assert_same(weights_of(tmp_path / "back"), weights)
    back = settings_of(tmp_path / "back")
    assert (back["bias"], back["qkv_bias"]) == (fc_bias, qkv_bias)
    assert back["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 2.0}
    kept = heads.eagle1_settings(**changes)
    assert {key: back[key] for key in kept.keys() - {"bias", "rope_scaling"}} == {
        key: kept[key] for key in kept.keys() - {"bias", "rope_scaling"}
    }

    convert(tmp_path / "back", tmp_path / "again", "vllm", None, None)
    assert_same(weights_of(tmp_path / "again"), weights)
    assert settings_of(tmp_path / "again") == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_eagle3_goes_round_all_formats(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = heads.eagle3_weights(dtype=dtype)
    source = heads.write(tmp_path / "in", heads.eagle3_settings(), weights, pickled=True)
    convert(source, tmp_path / "a", "vllm", None, [1, 2, 3])
    convert(tmp_path / "a", tmp_path / "b", "speculators", None, None)
    convert(tmp_path / "b", tmp_path / "c", "safeailab", None, None)
    convert(tmp_path / "c", tmp_path / "d", "speculators", None, None)
    convert(tmp_path / "d", tmp_path / "e", "vllm", None, None)
    assert_same(weights_of(tmp_path / "a"), renamed(weights))
    assert_same(weights_of(tmp_path / "b"), renamed(weights))
    assert_same(weights_of(tmp_path / "c"), weights)
    assert settings_of(tmp_path / "e") == settings_of(tmp_path / "a")
    assert settings_of(tmp_path / "d") == settings_of(tmp_path / "b")
    found = settings_of(tmp_path / "a")
    assert found["architectures"] == ["Eagle3LlamaForCausalLM"]
    assert found[AUX] == [1, 2, 3]
    assert found["num_aux_hidden_states"] == 3
    assert found["draft_vocab_size"] == DRAFT_VOCAB
    assert found["rope_parameters"] == {"rope_type": "default", "rope_theta": 500000.0}
    assert found["hidden_act"] == "silu"  # what an absent setting means is written out
    assert found["dtype"] == str(dtype).removeprefix("torch.")


def test_speculators_norms_and_layers_survive_vllms_format(tmp_path: Path) -> None:
    weights = heads.eagle3_weights("layers.0.", num_aux=4) | {f"fc_norm.{i}.weight": torch.rand(HIDDEN) for i in range(4)}
    settings = heads.speculators_settings(fc_norm=True, **{AUX: [0, 1, 2, 4]})
    source = heads.write(tmp_path / "in", settings, weights)
    convert(source, tmp_path / "vllm", "vllm", None, None)
    found = settings_of(tmp_path / "vllm")
    assert (found[AUX], found["num_aux_hidden_states"]) == ([0, 1, 2, 4], 4)
    convert(tmp_path / "vllm", tmp_path / "back", "speculators", None, None)
    assert_same(weights_of(tmp_path / "back"), weights)
    back = settings_of(tmp_path / "back")
    flags = ("fc_norm", "norm_before_fc", "norm_before_residual", "norm_output", "draft_vocab_size", "target_hidden_size", AUX)
    assert {flag: back[flag] for flag in flags} == {flag: settings[flag] for flag in flags}
    layer = settings["transformer_layer_config"]
    assert isinstance(layer, dict)
    assert back["transformer_layer_config"].items() >= layer.items()


def test_qwen3_layers_keep_their_norms(tmp_path: Path) -> None:
    norms = {f"layers.0.self_attn.{name}.weight": torch.rand(models.HEAD_DIM) for name in ("q_norm", "k_norm")}
    source = heads.write(tmp_path / "in", heads.speculators_settings(), heads.eagle3_weights("layers.0.") | norms)
    convert(source, tmp_path / "vllm", "vllm", None, None)
    assert settings_of(tmp_path / "vllm")["architectures"] == ["Eagle3Qwen3ForCausalLM"]
    assert weights_of(tmp_path / "vllm").keys() >= norms.keys()


def test_a_whole_vocabulary_needs_no_maps(tmp_path: Path) -> None:
    weights = heads.eagle3_weights() | {"lm_head.weight": torch.rand(VOCAB, HIDDEN), "t2d": torch.ones(VOCAB, dtype=torch.bool)}
    weights["d2t"] = torch.zeros(VOCAB, dtype=torch.long)
    source = heads.write(tmp_path / "in", heads.eagle3_settings(draft_vocab_size=VOCAB), weights)
    convert(source, tmp_path / "out", "vllm", None, None)
    assert weights_of(tmp_path / "out").keys() == renamed(weights).keys() - {"d2t", "t2d"}


def test_a_missing_t2d_is_made_from_d2t(tmp_path: Path) -> None:
    weights = heads.eagle3_weights()
    source = heads.write(tmp_path / "in", heads.eagle3_settings(), {k: v for k, v in weights.items() if k != "t2d"})
    convert(source, tmp_path / "out", "vllm", None, None)
    assert_same(weights_of(tmp_path / "out"), renamed(weights))


def test_target_layers_are_counted_as_vllm_counts(target: Path, tmp_path: Path) -> None:
    """SpecForge names layers by their own index, from 1; what vLLM calls k is the output of the k-th layer."""
    theirs = heads.write(tmp_path / "a", heads.specforge_settings([1, 2, 3]), heads.eagle3_weights())
    (reason,) = judge(read_head(theirs), None).differences
    assert reason == f"{AUX} [1, 2, 3] count the target's layers by their own index, vLLM by their outputs [2, 3, 4], one more each"
    notes = convert(theirs, tmp_path / "a-out", "vllm", None, None)
    assert judge(read_head(tmp_path / "a-out"), None).verdict == "fits"
    assert settings_of(tmp_path / "a-out")[AUX] == [2, 3, 4]
    assert "names target layers [1, 2, 3] by their own index" in " ".join(notes)
    other = heads.write(tmp_path / "b", heads.specforge_settings([2, 3, 4]), heads.eagle3_weights())
    convert(other, tmp_path / "b-out", "vllm", target, None)
    assert settings_of(tmp_path / "b-out")[AUX] == [2, 3, 4]
    top = heads.write(tmp_path / "c", heads.specforge_settings(None, **{AUX: [1, 2, 3]}), heads.eagle3_weights())
    convert(top, tmp_path / "c-out", "vllm", None, None)
    assert settings_of(tmp_path / "c-out")[AUX] == [1, 2, 3]


def test_a_target_gives_the_layers_that_are_usual(tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    deep.mkdir()
    (deep / "config.json").write_text(json.dumps(models.llama_settings(num_hidden_layers=32)))
    source = heads.write(tmp_path / "in", heads.eagle3_settings(), heads.eagle3_weights())
    assert "named no target layers; wrote the usual [2, 16, 29]" in convert(source, tmp_path / "a", "vllm", deep, None)
    assert settings_of(tmp_path / "a")[AUX] == [2, 16, 29]
    notes = convert(source, tmp_path / "b", "vllm", None, None)
    assert "names no target layers" in notes[0]
    assert AUX not in settings_of(tmp_path / "b")


def test_the_targets_lm_head_in_an_eagle1_head_is_dropped(target: Path, tmp_path: Path) -> None:
    copied = load_file(target / "model.safetensors")["lm_head.weight"]
    weights = heads.eagle1_weights(torch.float32)
    source = heads.write(tmp_path / "in", heads.eagle1_settings(), weights | {"lm_head.weight": copied})
    notes = convert(source, tmp_path / "out", "vllm", target, None)
    assert notes[0] == "mended: vLLM has no place for lm_head.weight, which nothing needs"
    assert_same(weights_of(tmp_path / "out"), weights)
    other = heads.write(tmp_path / "other", heads.eagle1_settings(), weights | {"lm_head.weight": copied + 1})
    with pytest.raises(ValueError, match=r"lm_head.weight is not .*target's.*get a head for this target"):
        convert(other, tmp_path / "no", "vllm", target, None)


def test_safeailab_gets_the_targets_embedding(tmp_path: Path) -> None:
    convert(HEAD, tmp_path / "out", "safeailab", TARGET, None)
    found = weights_of(tmp_path / "out")
    expected = load_file(TARGET / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(found.pop("embed_tokens.weight"), expected)
    assert_same(found, load_file(HEAD / "model.safetensors"))
    assert settings_of(tmp_path / "out")["bias"] is False
    with pytest.raises(ValueError, match="wants embed_tokens, which this head leaves to the target; give --target"):
        convert(HEAD, tmp_path / "no", "safeailab", None, None)


# --- refused ------------------------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any], heads.Weights], object]


def both(*changes: Change) -> Change:
    return lambda settings, weights: [change(settings, weights) for change in changes]


def removed(*names: str) -> Change:
    return lambda settings, weights: [weights.pop(name) for name in names]


def setting(**changes: object) -> Change:
    return lambda settings, weights: settings.update(changes)


def weight(name: str, tensor: torch.Tensor) -> Change:
    return lambda settings, weights: weights.update({name: tensor})


EAGLE1_REFUSALS: list[tuple[Change, str]] = [
    (weight("layers.0.input_layernorm.weight", torch.ones(HIDDEN)), "whose first layer has no input norm"),
    (weight("lm_head.weight", torch.ones(VOCAB, HIDDEN)), "lm_head.weight in an EAGLE-1 head.*give --target"),
    (weight("norm.weight", torch.ones(HIDDEN)), "norm.weight is unknown in an EAGLE-1 head"),
    (removed("layers.0.mlp.up_proj.weight"), "layers.0.mlp.up_proj.weight is missing from the weights; get the whole head"),
    (removed("layers.0.self_attn.v_proj.bias"), "layers.0.self_attn.v_proj.bias is missing"),
    (setting(bias=False), '"bias": false but there is an fc.bias; correct config.json'),
    (lambda s, w: (s.update(bias=True), w.pop("fc.bias")), "fc.bias is missing from the weights"),
    (setting(hidden_size=2 * HIDDEN), r"embed_tokens.weight has shape \[512, 128\], the sizes in config.json make it \[512, 256\]"),
    (setting(vocab_size=VOCAB + 1), r"embed_tokens.weight has shape \[512, 128\].*make it \[513, 128\]; correct config.json"),
    (setting(num_attention_heads=8, head_dim=32), r"layers.0.self_attn.o_proj.weight has shape \[128, 128\].*make it \[128, 256\]"),
    (setting(rope_scaling={"rope_type": "spiral"}), "a rotary embedding of type 'spiral'; set rope_type to one of default, linear"),
    (setting(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "of type llama3 without low_freq_factor, high_freq_factor"),
    (setting(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (setting(num_key_value_heads=3), "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
    (lambda s, w: s.pop("intermediate_size"), "config.json: intermediate_size is None"),
    (weight("fc.weight", torch.full((HIDDEN, 2 * HIDDEN), torch.nan)), "fc.weight holds NaN or infinity"),
    (weight("fc.bias", torch.full((HIDDEN,), torch.inf)), "fc.bias holds NaN or infinity"),
    (weight("fc.weight", torch.zeros(HIDDEN, 2 * HIDDEN, dtype=torch.int8)), "fc.weight is torch.int8.*unquantized"),
    (setting(quantization_config={"bits": 4}), "a quantized head"),
    (setting(architectures="LlamaForCausalLM"), "config.json: architectures is 'LlamaForCausalLM', not a JSON list; correct it"),
    (setting(use_sliding_window=True), "sliding-window"),
    (removed("fc.weight"), "no EAGLE head.*give the folder of the head"),
]


@pytest.mark.parametrize(("change", "message"), EAGLE1_REFUSALS, ids=[m[:50] for _, m in EAGLE1_REFUSALS])
def test_a_broken_eagle1_head_is_refused(change: Change, message: str, tmp_path: Path) -> None:
    settings, weights = heads.eagle1_settings(), heads.eagle1_weights(qkv_bias=True)
    change(settings, weights)
    with pytest.raises(ValueError, match=message) as refused:
        convert(heads.write(tmp_path / "in", settings, weights), tmp_path / "out", "vllm", None, None)
    assert str(tmp_path / "in") in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


EAGLE3_REFUSALS: list[tuple[Change, str]] = [
    (removed("d2t"), "d2t is missing"),
    (removed("norm.weight", "lm_head.weight"), "lm_head.weight, norm.weight are missing"),
    (weight("d2t", torch.arange(DRAFT_VOCAB) * 2), r"d2t leads to tokens from 0 to 765 of a vocabulary of 512"),
    (weight("d2t", -torch.arange(DRAFT_VOCAB)), "d2t leads two draft tokens to one target token"),
    (weight("t2d", torch.arange(VOCAB) % 2 == 1), "t2d does not mark the tokens that d2t leads to"),
    (weight("t2d", torch.ones(VOCAB)), "t2d is torch.float32, a bool type is expected"),
    (weight("fc.bias", torch.ones(HIDDEN)), "fc.bias is unknown in an EAGLE-3 head"),
    (
        both(
            weight("midlayer.self_attn.kv_a_proj_with_mqa.weight", torch.ones(320, 2 * HIDDEN)),
            removed("midlayer.self_attn.k_proj.weight", "midlayer.self_attn.v_proj.weight"),
        ),
        "layers with latent attention .MLA., which no head has here; take one whose layers are Llama's",
    ),
    (
        both(weight("input_norm.weight", torch.ones(3 * HIDDEN)), setting(norm_before_fc=False)),
        'input_norm.weight is in the weights, but config.json says "norm_before_fc": false; set it to true',
    ),
    (setting(norm_before_fc=True), "input_norm.weight is missing"),
    (setting(draft_vocab_size=128), r"d2t has shape \[256\].*make it \[128\]"),
    (setting(target_hidden_size=100), "fc.weight reads 384 features, no multiple of the target's 100; correct target_hidden_size"),
    (setting(target_hidden_size=64), "it reads 6 layers of the target and names none"),
    (setting(target_hidden_size=192, **{AUX: [1, 2]}), "embed_tokens.weight is missing"),
    (setting(**{AUX: [1, 2]}), "names 2 layers, fc.weight reads 3; name as many"),
    (setting(**{AUX: [1, 2, 2]}), r"\[1, 2, 2\] are not different layers"),
    (setting(**{AUX: [3, 2, 1]}), r"\[3, 2, 1\] are not different layers in rising order"),
    (setting(**{AUX: "2"}), "is no list of integers"),
    (
        weight("fc.weight", torch.ones(HIDDEN, 4 * HIDDEN)),
        "reads 4 layers of the target and names none; name them with --aux-layers",
    ),
    (setting(eagle_config={"use_aux_hidden_state": False}), "use_aux_hidden_state is false"),
    (weight("midlayer.self_attn.o_proj.bias", torch.ones(HIDDEN)), "biases in only one of q, k, v and o_proj"),
]


@pytest.mark.parametrize(("change", "message"), EAGLE3_REFUSALS, ids=[m[:50] for _, m in EAGLE3_REFUSALS])
def test_a_broken_eagle3_head_is_refused(change: Change, message: str, tmp_path: Path) -> None:
    settings, weights = heads.eagle3_settings(), heads.eagle3_weights()
    change(settings, weights)
    with pytest.raises(ValueError, match=message) as refused:
        convert(heads.write(tmp_path / "in", settings, weights), tmp_path / "out", "vllm", None, None)
    assert str(tmp_path / "in") in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_speculators_heads_must_say_where_their_norm_is(tmp_path: Path) -> None:
    settings = heads.speculators_settings()
    del settings["norm_before_residual"]
    with pytest.raises(ValueError, match="lacks norm_before_residual, and loaders differ"):
        read_head(heads.write(tmp_path / "a", settings, heads.eagle3_weights("layers.0.")))
    other = heads.speculators_settings(speculators_model_type="dflash")
    with pytest.raises(ValueError, match='a "dflash" speculator'):
        read_head(heads.write(tmp_path / "b", other, heads.eagle3_weights("layers.0.")))


def test_what_a_format_cannot_say_is_refused(tmp_path: Path) -> None:
    one = heads.write(tmp_path / "one", heads.eagle1_settings(), heads.eagle1_weights())
    with pytest.raises(ValueError, match="speculators has no EAGLE-1 heads; use --to vllm or --to safeailab"):
        convert(one, tmp_path / "out", "speculators", None, None)
    with pytest.raises(ValueError, match=r"--aux-layers: .* is an EAGLE-1 head"):
        convert(one, tmp_path / "out", "vllm", None, [1, 2, 3])
    spec = heads.write(tmp_path / "spec", heads.speculators_settings(), heads.eagle3_weights("layers.0."))
    with pytest.raises(ValueError, match="cannot load an EAGLE-3 head with norm_before_residual; use --to vllm"):
        convert(spec, tmp_path / "out", "safeailab", None, None)
    rotary: list[tuple[dict[str, Any], str]] = [
        ({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}, "a scaled rotary embedding of base 1000000.0"),
        ({"rope_scaling": LLAMA3}, "a rotary embedding of type llama3"),
    ]
    for i, (changes, why) in enumerate(rotary):
        odd = heads.write(tmp_path / f"rotary{i}", heads.eagle1_settings(**changes), heads.eagle1_weights())
        with pytest.raises(ValueError, match=f"cannot load an EAGLE-1 head with {why}; use --to vllm"):
            convert(odd, tmp_path / "out", "safeailab", None, None)
    assert not (tmp_path / "out").exists()


def test_a_head_of_another_target_is_refused(target: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not fit .*: it takes features of size 384, the target has 128"):
        convert(HEAD, tmp_path / "out", "vllm", target, None)
    three = heads.write(tmp_path / "three", heads.eagle3_settings(), heads.eagle3_weights())
    with pytest.raises(
        ValueError, match=r"would by default read layers \[2, 2, 1\] of a target with 4; name others with --aux-layers"
    ):
        convert(three, tmp_path / "out", "vllm", target, None)
    with pytest.raises(ValueError, match=r"reads layers \[1, 2, 5\] of a target with 4"):
        convert(three, tmp_path / "out", "vllm", target, [1, 2, LAYERS + 1])
    convert(three, tmp_path / "out", "vllm", target, [0, 2, LAYERS])
    assert settings_of(tmp_path / "out")[AUX] == [0, 2, LAYERS]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for out in (taken, tmp_path):
        with pytest.raises(ValueError, match="exists and is not an empty folder; name a new one"):
            convert(HEAD, out, "vllm", None, None)
    assert taken.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    convert(HEAD, tmp_path / "empty", "vllm", None, None)
    assert_same(weights_of(tmp_path / "empty"), load_file(HEAD / "model.safetensors"))


class Malice:
    """What a hostile pickle does when it is loaded the ordinary way."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder, trace = heads.write(tmp_path / "in", heads.eagle1_settings(), {}, pickled=True), tmp_path / "trace"
    torch.save(heads.eagle1_weights() | {"fc.bias": Malice(trace)}, folder / "pytorch_model.bin")
    for use in (read_head, engine_args):
        with pytest.raises(ValueError, match="refused, it is broken or holds Python objects besides tensors"):
            use(folder)
    assert not trace.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert trace.exists()  # it does run code where it is let


def test_broken_files_are_named(tmp_path: Path) -> None:
    def head(name: str, **options: Any) -> Path:
        return heads.write(tmp_path / name, heads.eagle1_settings(), heads.eagle1_weights(), **options)

    cut = head("cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    missing = head("missing", shards=2)
    (missing / "model-00002-of-00002.safetensors").unlink()
    outside = head("outside", shards=2)
    (outside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": "../cut/model.safetensors"}}))
    twice = head("twice")
    (twice / "copy.safetensors").write_bytes((twice / "model.safetensors").read_bytes())
    other = head("other", pickled=True)
    torch.save({"epoch": 3, "model": heads.eagle1_weights()}, other / "pytorch_model.bin")
    old = head("old", pickled=True)
    (old / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}, protocol=2)[:-3])
    nothing = head("nothing")
    (nothing / "model.safetensors").unlink()
    for folder, message in (
        (cut, "model.safetensors: no readable safetensors file"),
        (missing, "model-00002-of-00002.safetensors: missing, though model.safetensors.index.json names it"),
        (outside, "names a file outside its folder"),
        (twice, "is in another weight file too"),
        (other, "holds something besides tensors by name"),
        (old, "pytorch_model.bin: no readable torch checkpoint"),
        (nothing, "no weights"),
        (tmp_path / "none", "no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            read_head(folder)


# --- looked at ----------------------------------------------------------------------------------------------------------------


def test_inspect_knows_the_shipped_head() -> None:
    found = inspect(HEAD, TARGET)
    expected = {
        "kind": "EAGLE-1",
        "format": "vllm",
        "dtype": "bfloat16",
        "fits_target": True,
        "misfits": [],
        "wrong": [],
        "odd": [],
    }
    assert found.items() >= (expected | {"parameters": 1_868_160, "hidden_size": 384, "fc_bias": False}).items()


def test_inspect_says_what_is_odd(target: Path, tmp_path: Path) -> None:
    weights = heads.eagle1_weights()
    weights["layers.0.mlp.up_proj.weight"].zero_()
    weights["post"] = torch.ones(1)
    weights["fc.weight"][0, 0] = torch.inf
    source = heads.write(tmp_path / "in", heads.eagle1_settings(max_position_embeddings=512), weights, pickled=True)
    found = inspect(source, target)
    assert found["fits_target"]
    assert found["wrong"] == ["post is unknown in an EAGLE-1 head with these settings; get the original head",
                              "fc.weight holds NaN or infinity; get or train the head again"]  # fmt: skip
    odd = " | ".join(found["odd"])
    for words in (
        "pytorch_model.bin is a pickle; vllm-eagle convert writes safetensors",
        "fc.bias needs vllm_eagle's own class",
        "max_position_embeddings 512 is below the target's 1024",
        "layers.0.mlp.up_proj.weight is all zeros",
        "weights of several types: float16, float32",
    ):
        assert words in odd
    assert len(found["odd"]) == 5


def test_inspect_says_which_target_fits(target: Path, tmp_path: Path) -> None:
    assert inspect(HEAD, target)["misfits"] == [
        "it takes features of size 384, the target has 128",
        "its vocabulary has 4096 tokens, the target's 512",
    ]
    three = heads.write(tmp_path / "three", heads.eagle3_settings(), heads.eagle3_weights())
    found = inspect(three, target)
    assert not found["fits_target"]
    assert "would by default read layers [2, 2, 1]" in found["misfits"][0]
    assert "vLLM assumes (2, n // 2, n - 3), here (2, 2, 1), of n" in found["odd"][0]
    assert (found["num_aux_layers"], found["draft_vocab_size"], found["own_lm_head"], found["own_embedding"]) == (
        3,
        256,
        True,
        False,
    )


def test_the_command_line_converts_and_inspects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = heads.write(tmp_path / "in", heads.eagle3_settings(), heads.eagle3_weights())
    assert cli.main(["convert", str(source), str(tmp_path / "out"), "--aux-layers", "2", "16", "29"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'}\n"
    assert cli.main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["aux_layers"] == [2, 16, 29]
    assert cli.main(["inspect", str(tmp_path / "out"), "--target", str(TARGET)]) == 1
    shown = capsys.readouterr().out
    assert "fits        " in shown
    assert "/pair/target: NO" in shown
    assert "reads       3 layers, [2, 16, 29] of targets with hidden size 128" in shown
    assert max(len(line) for line in shown.splitlines()) <= 118
    assert cli.main(["convert", str(source), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"vllm-eagle: {tmp_path / 'out'}: exists and is not an empty folder")
