"""Heads that are damaged, renamed or reconfigured: single cases with the right verdict, and any number of random ones."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.heads import heads
from tests.heads.heads import DRAFT_VOCAB
from tests.models import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCAB

AUX = "eagle_aux_hidden_state_layer_ids"
Settings = dict[str, Any]
Change = Callable[[Settings, heads.Weights], object]


@dataclass(frozen=True)
class Base:
    """A whole head in some format, float32 so that a float32 engine holds its very values."""

    settings: Callable[[], Settings]
    weights: Callable[[], heads.Weights]

    def write(self, folder: Path, *changes: Change, **options: Any) -> Path:
        settings, weights = json.loads(json.dumps(self.settings())), dict(self.weights())
        for change in changes:
            change(settings, weights)
        return heads.write(folder, settings, weights, **options)


def _eagle1(**options: Any) -> heads.Weights:
    return heads.eagle1_weights(torch.float32, **options)


def _eagle3(prefix: str = "midlayer.", num_aux: int = 3) -> heads.Weights:
    return heads.eagle3_weights(prefix, torch.float32, num_aux)


BASES = {
    "vllm-1": Base(lambda: heads.eagle1_settings(architectures=["EagleLlamaForCausalLM"]), lambda: _eagle1(fc_bias=False)),
    "safeailab-1": Base(lambda: heads.eagle1_settings(), _eagle1),
    "vllm-3": Base(lambda: heads.eagle3_settings(**{AUX: [1, 2, 3]}), lambda: _eagle3("layers.0.")),
    "specforge-3": Base(lambda: heads.specforge_settings([2, 3, 4]), _eagle3),
    "speculators-3": Base(lambda: heads.speculators_settings(norm_output=False), lambda: _eagle3("layers.0.")),
}


def put(**changes: object) -> Change:
    """Settings at the top."""
    return lambda settings, weights: settings.update(changes)


def drop(*names: str) -> Change:
    return lambda settings, weights: [settings.pop(name, None) for name in names]


def without(*names: str) -> Change:
    return lambda settings, weights: [weights.pop(name, None) for name in names]


def tensor(name: str, value: Callable[[], torch.Tensor]) -> Change:
    return lambda settings, weights: weights.update({name: value()})


def in_layer(**changes: object) -> Change:
    """Settings of the layer, wherever the format has them; None takes one out."""

    def change(settings: Settings, weights: heads.Weights) -> None:
        layer = settings.get("transformer_layer_config", settings)
        for name, value in changes.items():
            layer.pop(name, None)
            if value is not None:
                layer[name] = value

    return change


def renamed(rename: Callable[[str], str]) -> Change:
    def change(settings: Settings, weights: heads.Weights) -> None:
        moved = {rename(name): value for name, value in weights.items()}
        weights.clear()
        weights.update(moved)

    return change


def prefixed(prefix: str) -> Change:
    """As a trainer saves it that wraps the layers in a module, but not the LM head and the maps."""
    return renamed(lambda name: name if name.startswith(("lm_head", "d2t", "t2d")) else prefix + name)


def biased(settings: Settings, weights: heads.Weights) -> None:
    for name, size in (("q", HEADS * HEAD_DIM), ("k", KV_HEADS * HEAD_DIM), ("v", KV_HEADS * HEAD_DIM)):
        weights[f"layers.0.self_attn.{name}_proj.bias"] = torch.linspace(-1, 1, size)


def second_layer(settings: Settings, weights: heads.Weights) -> None:
    layer = {name: value for name, value in weights.items() if name.startswith("layers.0.")}
    weights |= {name.replace("layers.0.", "layers.1."): value.flip(0) for name, value in layer.items()}
    weights["layers.1.input_layernorm.weight"] = torch.linspace(0.5, 1.5, HIDDEN)


def whole_vocabulary(settings: Settings, weights: heads.Weights) -> None:
    generator = torch.Generator().manual_seed(9)
    weights["lm_head.weight"] = torch.randn(VOCAB, HIDDEN, generator=generator)
    weights |= {"d2t": torch.zeros(VOCAB, dtype=torch.long), "t2d": torch.ones(VOCAB, dtype=torch.bool)}
    settings["draft_vocab_size"] = VOCAB


def padded(settings: Settings, weights: heads.Weights) -> None:
    weights["lm_head.weight"] = torch.cat([weights["lm_head.weight"], torch.full((32, HIDDEN), 7.0)])


def nested(settings: Settings, weights: heads.Weights) -> None:
    """As vLLM's converter once wrote config.json."""
    model = dict(settings)
    settings.clear()
    settings |= {"model_type": "eagle", "model": model, "architectures": ["EAGLEModel"], "eagle_fc_bias": True}


def four_layers(settings: Settings, weights: heads.Weights) -> None:
    settings[AUX] = [1, 2, 3, 4]
    weights["fc.weight"] = torch.cat([weights["fc.weight"], weights["fc.weight"][:, :HIDDEN]], dim=1)


def two_layers(settings: Settings, weights: heads.Weights) -> None:
    settings[AUX] = [1, 3]
    weights["fc.weight"] = weights["fc.weight"][:, : 2 * HIDDEN].contiguous()


def three_layers(settings: Settings, weights: heads.Weights) -> None:
    """EAGLE-3: layers after the first read the feature alone."""
    second_layer(settings, weights)
    for name in ("q_proj", "k_proj", "v_proj"):
        name = f"layers.1.self_attn.{name}.weight"
        weights[name] = weights[name][:, :HIDDEN].contiguous()
    weights.pop("layers.1.hidden_norm.weight")
    weights |= {n.replace("layers.1.", "layers.2."): w.clone() for n, w in weights.items() if n.startswith("layers.1.")}


def qwen3_norms(settings: Settings, weights: heads.Weights) -> None:
    weights |= {f"layers.0.self_attn.{name}.weight": torch.linspace(0.5, 1.5, HEAD_DIM) for name in ("q_norm", "k_norm")}


def lm_head_of(target: Path, factor: float = 1.0) -> Change:
    return tensor("lm_head.weight", lambda: load_file(target / "model.safetensors")["lm_head.weight"] * factor)


def rows(name: str) -> Callable[[], torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"input_norm": (3 * HIDDEN,), "fc_norm": (HIDDEN,)}
    return lambda: 1 + 0.1 * torch.randn(*shapes[name], generator=generator)


def other_family(architecture: str, model_type: str) -> Change:
    return put(architectures=[architecture], model_type=model_type)


def fc_norms(settings: Settings, weights: heads.Weights) -> None:
    weights |= {f"fc_norm.{i}.weight": rows("fc_norm")() for i in range(3)}


def attention_biases(settings: Settings, weights: heads.Weights) -> None:
    """Of all projections, as EAGLE-3's loaders have them."""
    biased(settings, weights)
    weights["layers.0.self_attn.o_proj.bias"] = torch.linspace(-1, 1, HIDDEN)


def mlp_biases(settings: Settings, weights: heads.Weights) -> None:
    for name, size in (("gate", FFN), ("up", FFN), ("down", HIDDEN)):
        weights[f"layers.0.mlp.{name}_proj.bias"] = torch.linspace(-0.5, 0.5, size)


def wide(settings: Settings, weights: heads.Weights) -> None:
    """EAGLE-3: half as wide again as its target, with an embedding of its own."""
    width, generator = HIDDEN * 3 // 2, torch.Generator().manual_seed(6)
    shapes = {"fc.weight": (width, 3 * HIDDEN), "lm_head.weight": (DRAFT_VOCAB, width), "embed_tokens.weight": (VOCAB, width)}
    for name, weight in weights.items():
        if name.startswith("layers.0.") or name == "norm.weight":
            shapes[name] = tuple({HIDDEN: width, 2 * HIDDEN: 2 * width}.get(size, size) for size in weight.shape)
    for name, size in (("q", HEADS * HEAD_DIM), ("k", KV_HEADS * HEAD_DIM), ("v", KV_HEADS * HEAD_DIM)):
        shapes[f"layers.0.self_attn.{name}_proj.weight"] = (size, 2 * width)
    shapes["layers.0.self_attn.o_proj.weight"] = (width, HEADS * HEAD_DIM)
    shapes |= {f"layers.0.mlp.{name}_proj.weight": (FFN, width) for name in ("gate", "up")}
    shapes["layers.0.mlp.down_proj.weight"] = (width, FFN)
    for name, shape in shapes.items():
        weights[name] = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5 if len(shape) > 1 else torch.ones(shape)
    settings |= {"hidden_size": width, "target_hidden_size": HIDDEN}


def _design(base: str, *changes: Change) -> Base:
    def changed() -> tuple[Settings, heads.Weights]:
        settings, weights = json.loads(json.dumps(BASES[base].settings())), dict(BASES[base].weights())
        for change in changes:
            change(settings, weights)
        return settings, weights

    return Base(lambda: changed()[0], lambda: changed()[1])


_LINEAR = put(rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_theta=2e4)
# Designs of heads besides the usual ones: each is judged, served, measured and trained further as it is.
DESIGNS: dict[str, Base] = {
    "two layers, EAGLE-1": _design("vllm-1", second_layer),
    "three layers, EAGLE-3": _design("vllm-3", three_layers),
    "norm_before_residual": _design("vllm-3", put(norm_before_residual=True)),
    "norm_output": _design("vllm-3", put(norm_output=True)),
    "norm_before_fc": _design("vllm-3", tensor("input_norm.weight", lambda: rows("input_norm")()), put(norm_before_fc=True)),
    "fc_norm": _design("vllm-3", lambda settings, weights: fc_norms(settings, weights), put(fc_norm=True)),
    "q_norm and k_norm": _design("vllm-3", qwen3_norms),
    "biases of q, k and v, EAGLE-1": _design("vllm-1", biased),
    "biases of attention, EAGLE-1": _design("vllm-1", attention_biases),
    "biases of attention, EAGLE-3": _design("vllm-3", attention_biases),
    "biases of the MLP": _design("vllm-3", mlp_biases),
    "a rotary embedding of its own, EAGLE-1": _design("vllm-1", _LINEAR),
    "a rotary embedding of its own, EAGLE-3": _design("vllm-3", _LINEAR),
    "sliding layers": _design("vllm-3", put(sliding_window=20, layer_types=["sliding_attention"])),
    "a width of its own": _design("vllm-3", wide),
}

_FITS, _CONVERT, _NO = "fits", "fits after convert", "does not fit"
_FC_INPUT = tensor("input_norm.weight", rows("input_norm"))

# Name: base, changes, verdict, words of the first reason. Each was, or could be, a head that served badly without a word.
CASES: dict[str, tuple[str, list[Change], str, str]] = {
    "as vLLM has it, EAGLE-1": ("vllm-1", [], _FITS, ""),
    "as vLLM has it, EAGLE-3": ("vllm-3", [], _FITS, ""),
    "as SpecForge has it": ("specforge-3", [], _FITS, ""),
    "as SafeAILab has it": ("safeailab-1", [], _CONVERT, "its fc.bias has no place in vLLM's own EAGLE class"),
    "as speculators has it": ("speculators-3", [], _CONVERT, "keeps the layer's settings under transformer_layer_config"),
    "the target's number of layers": (
        "vllm-3", [put(num_hidden_layers=40)], _CONVERT, "config.json says num_hidden_layers 40 to vLLM, it should be 1",
    ),
    "no number of layers, EAGLE-1": ("vllm-1", [drop("num_hidden_layers")], _CONVERT, "lacks num_hidden_layers, it should be 1"),
    "no number of layers, EAGLE-3": ("specforge-3", [drop("num_hidden_layers")], _CONVERT, "lacks num_hidden_layers"),
    "no d2t": ("vllm-3", [without("d2t")], _NO, "d2t is missing from the weights; get the whole head"),
    "input_norm without its flag": ("vllm-3", [_FC_INPUT], _CONVERT, "norm_before_fc False to vLLM, it should be True"),
    "input_norm against its flag": (
        "vllm-3", [_FC_INPUT, put(norm_before_fc=False)], _NO, 'config.json says "norm_before_fc": false; set it to true',
    ),
    "fc_norm without its flag": ("vllm-3", [fc_norms], _CONVERT, "fc_norm False to vLLM, it should be True"),
    "Mistral": ("vllm-1", [other_family("MistralForCausalLM", "mistral")], _CONVERT, "model_type 'mistral' to vLLM"),
    "Qwen2": ("vllm-1", [other_family("Qwen2ForCausalLM", "qwen2")], _CONVERT, "model_type 'qwen2' to vLLM"),
    "Qwen2 with biases": ("vllm-1", [other_family("Qwen2ForCausalLM", "qwen2"), biased], _CONVERT, "model_type 'qwen2' to vLLM"),
    "Qwen3": ("vllm-1", [other_family("Qwen3ForCausalLM", "qwen3")], _CONVERT, "model_type 'qwen3' to vLLM"),
    "biases that config.json does not tell": ("vllm-1", [biased], _CONVERT, "the checkpoint has q, k, v biases, and vLLM would"),
    "q_norm and k_norm under Llama's name": ("vllm-3", [qwen3_norms], _CONVERT, "model_type 'llama' to vLLM, it should be 'qwen3'"),
    "a whole vocabulary with maps": ("vllm-3", [whole_vocabulary], _CONVERT, "vLLM has no place for d2t, which nothing needs"),
    "four layers in a flat list": ("vllm-3", [four_layers], _CONVERT, "num_aux_hidden_states 3 to vLLM, it should be 4"),
    "two layers in a flat list": ("vllm-3", [two_layers], _CONVERT, "num_aux_hidden_states 3 to vLLM, it should be 2"),
    "four layers, speculators": ("speculators-3", [four_layers], _CONVERT, "transformer_layer_config"),
    "two layers, speculators": ("speculators-3", [two_layers], _CONVERT, "transformer_layer_config"),
    "speculators without hidden_act": ("speculators-3", [in_layer(hidden_act=None)], _CONVERT, "transformer_layer_config"),
    "two layers under the target's class": (
        "vllm-1", [second_layer, put(num_hidden_layers=2, architectures=["LlamaForCausalLM"])], _FITS, "",
    ),
    "three layers, EAGLE-3": ("vllm-3", [three_layers], _CONVERT, "num_hidden_layers 1 to vLLM, it should be 3"),
    "q_norm and k_norm in EAGLE-1": ("vllm-1", [qwen3_norms], _NO, "k_norm.weight is unknown in an EAGLE-1 head"),
    "padded rows": ("vllm-3", [padded], _CONVERT, "lm_head.weight has 288 rows, vLLM takes 256; the rest is padding"),
    "nested as older vLLM wrote it": ("safeailab-1", [nested], _CONVERT, "keeps the layer's settings under model"),
    "one prefix, EAGLE-1": ("vllm-1", [prefixed("model.")], _CONVERT, "called model.embed_tokens.weight, where vLLM looks"),
    "one prefix, EAGLE-3": ("vllm-3", [prefixed("model.")], _CONVERT, "called model.fc.weight, where vLLM looks for fc.weight"),
    "one prefix before midlayer": ("specforge-3", [prefixed("module.")], _CONVERT, "called module.fc.weight"),
    "angles that every loader computes": (
        "vllm-1", [tensor("layers.0.self_attn.rotary_emb.inv_freq", lambda: torch.ones(16))], _CONVERT, "rotary_emb.inv_freq",
    ),
    "null where vLLM wants none": (
        "vllm-3", [put(target_hidden_size=None)], _CONVERT, "config.json lacks target_hidden_size, it should be 128",
    ),
    "code to run": ("vllm-3", [put(auto_map={"AutoModel": "modeling.Model"})], _CONVERT, "auto_map"),
    "half a head": ("vllm-1", [without("layers.0.mlp.up_proj.weight")], _NO, "layers.0.mlp.up_proj.weight is missing"),
    "NaN": ("vllm-1", [tensor("fc.weight", lambda: torch.full((HIDDEN, 2 * HIDDEN), torch.nan))], _NO, "NaN or infinity"),
    "another vocabulary": ("vllm-1", [put(vocab_size=VOCAB + 8), without("embed_tokens.weight")], _NO, "has 520 tokens"),
    "layers that the target lacks": ("vllm-3", [put(**{AUX: [1, 2, 9]})], _NO, "reads layers [1, 2, 9] of a target with 4"),
}  # fmt: skip


def random_case(seed: int, target: Path, bases: dict[str, Base] = BASES) -> tuple[Base, list[Change], str]:
    """A base and up to three changes, with a name for the two."""
    rng = random.Random(seed)
    name = rng.choice(sorted(bases))
    weights = bases[name].weights()
    some = rng.choice(sorted(weights))
    size = rng.choice(["hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size"])
    classes = ["LlamaForCausalLM"], ["Qwen3ForCausalLM"], ["Eagle3LlamaForCausalLM"], [], ["X", "Y"]
    ropes = None, {"type": "linear", "factor": 2.0}, {"rope_type": "spiral"}, {"type": "linear"}
    flag = rng.choice(["norm_before_fc", "fc_norm", "norm_before_residual", "norm_output"])

    def number() -> object:
        return rng.choice([0, 1, 2, 3, 4, 40, 64, 128, 256, 512, None, "8", True])

    def either() -> bool:
        return rng.choice([True, False])

    kinds: list[tuple[str, Change]] = [
        (f"without {some}", without(some)),
        (f"twice as tall {some}", tensor(some, lambda: torch.cat([weights[some]] * 2))),
        (f"NaN in {some}", tensor(some, lambda: weights[some].float() * torch.nan)),
        ("prefix", prefixed(rng.choice(["model.", "module.", "ea_layer.", "a.b."]))),
        ("prefix everywhere", renamed(lambda n: "model." + n)),
        ("midlayer", renamed(lambda n: n.replace("layers.0.", "midlayer."))),
        ("layer 1", renamed(lambda n: n.replace("layers.0.", "layers.1."))),
        ("layers", in_layer(num_hidden_layers=number())),
        ("a size", in_layer(**{size: number()})),
        ("no size", in_layer(**{size: None})),
        ("draft vocabulary", put(draft_vocab_size=number())),
        ("no draft vocabulary", drop("draft_vocab_size")),
        ("target's size", put(target_hidden_size=number())),
        ("family", in_layer(model_type=rng.choice(["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", None]))),
        ("class", put(architectures=rng.choice(classes))),
        ("activation", in_layer(hidden_act=rng.choice(["silu", "gelu", None]))),
        ("attention_bias", in_layer(attention_bias=either())),
        ("bias", in_layer(bias=either())),
        ("mlp_bias", in_layer(mlp_bias=either())),
        ("rope", in_layer(rope_scaling=rng.choice(ropes))),
        ("theta", in_layer(rope_theta=rng.choice([1e6, -1.0, "x", None]))),
        ("aux layers", put(**{AUX: rng.choice([[1, 2, 3], [3, 2, 1], [1, 2], [0, 1, 2, 3], [1, 2, 9], None, "x"])})),
        ("nested aux layers", put(eagle_config={AUX: rng.choice([[1, 2, 3], [2, 3, 4], [1, 2]])})),
        ("aux count", put(num_aux_hidden_states=rng.choice([1, 2, 3, 4, None]))),
        ("norm flag", put(**{flag: either()})),
        ("input_norm", _FC_INPUT),
        ("fc_norm", fc_norms),
        ("padded", lambda s, w: padded(s, w) if "lm_head.weight" in w else None),
        ("whole vocabulary", lambda s, w: whole_vocabulary(s, w) if "d2t" in w else None),
        ("biases", biased),
        ("q_norm and k_norm", qwen3_norms),
        ("the target's LM head", lm_head_of(target)),
        ("another LM head", lm_head_of(target, 1.5)),
        ("a stranger", tensor("post_norm.weight", lambda: torch.ones(HIDDEN))),
        ("maps", tensor("d2t", lambda: torch.arange(DRAFT_VOCAB).flip(0))),
        ("angles", tensor("layers.0.self_attn.rotary_emb.inv_freq", lambda: torch.ones(16))),
        ("auto_map", put(auto_map={"": "x.y"})),
        ("nested", lambda s, w: nested(s, w) if "transformer_layer_config" not in s else None),
        ("sliding", in_layer(sliding_window=64, layer_types=["sliding_attention"])),
        ("full attention", in_layer(layer_types=["full_attention"] * rng.choice([1, 4]))),
        ("quantized", put(quantization_config={"bits": 4})),
    ]  # fmt: skip
    chosen = rng.sample(kinds, rng.choice([1, 1, 2, 3]))
    return bases[name], [change for _, change in chosen], f"{seed}: {name}, {', '.join(label for label, _ in chosen)}"
