"""Bad input: one error that names the option and the fix, before a model is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM
from vllm.engine.arg_utils import EngineArgs

from tests import models
from tests.engine.engines import ENGINE, trees
from vllm_eagle.algorithm.config import CONFIG_KEY, TreeConfig
from vllm_eagle.engine import seams, support
from vllm_eagle.options.engine_args import engine_args, serve_head
from vllm_eagle.pair import HEAD

# From 0.33 on vLLM refuses it, before we can.
SMALL_STEP = "max_num_batched_tokens is 16" if seams.known_version() == "0.32" else "max_num_batched_tokens=16 and num_lookahead"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 5}, "unknown option 'nodes'.*known options: budget, confidence_scale, .*, static_shape, topk"),
        ({"mode": "beam"}, "set mode to one of dynamic, static, chain"),
        ({"topk": 0}, "topk=0 is not possible; set topk to an integer from 1 to 64"),
        ({"topk": "8"}, "topk='8' is not possible"),
        ({"max_depth": True}, "max_depth=True is not possible"),
        ({"coupled": 1}, "set coupled to true or false"),
        ({"confidence_scale": 0}, "set it above 0"),
        ({"confidence_scale": "x"}, "set it to a number"),
        ({"draft_window": -1}, "draft_window=-1 is not possible; set draft_window to a number of tokens, or to 0 for all"),
        ({"draft_window": True}, "draft_window=True is not possible"),
        ({"draft_window": "512"}, "draft_window='512' is not possible"),
        ({"draft_window": 8}, "trees may be 8 deep; set draft_window to at least 9, or to 0"),
        ({"static_shape": [[0]]}, 'needs mode "static"'),
        ({"mode": "static", "static_shape": [[0, 0]]}, r"holds \[0, 0\] but not its parent \[0\]; add the parent"),
        ({"mode": "static", "static_shape": [[0], [0]]}, "twice; remove one"),
        ({"mode": "static", "static_shape": "0"}, "give a list of rank paths"),
        ({"mode": "static", "static_shape": [[-1]]}, "list of ranks from 0"),
        ({"mode": "static", "static_shape": [[i] for i in range(9)]}, "has 9 nodes, num_speculative_tokens allows 8"),
    ],
)
def test_bad_tree_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TreeConfig.from_options(8, options)


@pytest.mark.parametrize("count", [0, 128, 2.5, True])
def test_bad_node_counts_are_named(count: Any) -> None:
    with pytest.raises(ValueError, match="set num_draft_tokens to an integer from 1 to 127"):
        TreeConfig(num_draft_tokens=count)


def test_heads_are_told_apart_by_their_config(random_models: dict[str, Path]) -> None:
    assert serve_head(random_models["eagle"]) == (str(random_models["eagle"]), "eagle")
    assert serve_head(random_models["eagle3"]) == (str(random_models["eagle3"]), "eagle3")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such folder"),
        ({}, "config.json: missing"),
        ({"config.json": "{"}, "config.json: no JSON"),
        ({"config.json": "{}"}, r"no weights \(\*.safetensors or"),
    ],
)
def test_a_missing_or_broken_head_is_named(files: dict[str, str] | None, message: str, tmp_path: Path) -> None:
    head = tmp_path / "head"
    if files is not None:
        head.mkdir()
        for name, text in files.items():
            (head / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        engine_args(head)


def refused(model: Path, **settings: Any) -> str:
    """The message with which vLLM refuses to start."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  pydantic wraps some of them
        LLM(str(model), **(ENGINE | settings))
    return str(caught.value)


@pytest.fixture
def pair(random_models: dict[str, Path]) -> dict[str, Any]:
    return {"model": random_models["target"], "head": random_models["eagle"]}


def test_a_head_of_another_size_is_refused(random_models: dict[str, Path], tmp_path: Path) -> None:
    other = models.random_eagle1_head(tmp_path / "head", vocab_size=256)
    for head, words in ((HEAD, "it takes features of size 384, the target has 128"), (other, "its vocabulary has 256 tokens")):
        assert words in refused(random_models["target"], **trees(head))


def test_an_eagle3_head_that_names_impossible_layers_is_refused(random_models: dict[str, Path], tmp_path: Path) -> None:
    head = models.random_eagle3_head(tmp_path / "head")
    settings = json.loads((head / "config.json").read_text())
    del settings["eagle_aux_hidden_state_layer_ids"]  # vLLM would guess layers 2, 2 and 1 of four
    (head / "config.json").write_text(json.dumps(settings))
    words = "it would by default read layers [2, 2, 1] of a target with 4; name others with --aux-layers"
    assert words in refused(random_models["target"], **trees(head))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"additional_config": {CONFIG_KEY: {"top": 1}}}, "unknown option 'top'"),
        ({"additional_config": {CONFIG_KEY: 5}}, "must be an object of tree options"),
        ({"spec_model": None}, "set --speculative-model"),
        ({"spec_method": "ngram"}, 'speculative method "ngram" drafts no trees'),
        ({"async_scheduling": True}, "async_scheduling=true contradicts draft trees"),
        ({"worker_cls": "some.Worker"}, "worker_cls=some.Worker contradicts draft trees"),
        ({"spec_tokens": 200}, "set num_draft_tokens to an integer from 1 to 127"),
        ({"max_model_len": 16}, "does not fit max_model_len=16"),
        ({"max_num_batched_tokens": 16, "max_num_seqs": 8, "max_model_len": 64, "spec_tokens": 32}, SMALL_STEP),
        ({"kv_cache_dtype": "fp8"}, "set kv_cache_dtype to auto"),
    ],
)
def test_contradicting_engine_options_are_refused(changes: dict[str, Any], words: str, pair: dict[str, Any]) -> None:
    assert words in refused(pair["model"], **(trees(pair["head"]) | changes))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_head": 4, "n_layer": 4}, "ALiBi"),
        (
            {
                "architectures": ["DeepseekV2ForCausalLM"],
                "model_type": "deepseek_v2",
                "kv_lora_rank": 32,
                "q_lora_rank": None,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 16,
                "v_head_dim": 32,
                "n_routed_experts": 8,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 64,
                "num_key_value_heads": 4,
            },
            "(MLA)",
        ),
        (
            {
                "architectures": ["MambaForCausalLM"],
                "model_type": "mamba",
                "state_size": 16,
                "conv_kernel": 4,
                "intermediate_size": 256,
                "time_step_rank": 8,
            },
            "recurrent state",
        ),
    ],
    ids=["alibi", "mla", "mamba"],
)
def test_models_without_a_tree_kernel_are_refused(
    settings: dict[str, Any], words: str, tmp_path: Path, random_models: dict[str, Path]
) -> None:
    target = models.random_target(tmp_path / "target", **settings)
    message = refused(target, **trees(random_models["eagle"]))
    assert words in message, message


@pytest.mark.parametrize(
    ("property_name", "value", "words"),
    [
        ("is_encoder_decoder", True, "encoder-decoder"),
        ("is_multimodal_model", True, "multimodal"),
        ("is_hybrid", True, "recurrent state"),
    ],
)
def test_other_kinds_of_models_are_refused_by_their_config(
    property_name: str, value: object, words: str, random_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kinds that no tiny random model stands for: the property that vLLM's ModelConfig derives is set by hand."""
    arguments = EngineArgs(model=str(random_models["target"]), **(ENGINE | trees(random_models["eagle"])))
    config = arguments.create_engine_config()
    assert support.unsupported_reasons(config) == []
    monkeypatch.setattr(type(config.model_config), property_name, property(lambda self: value), raising=False)
    assert any(words in reason for reason in support.unsupported_reasons(config))


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "0.320.0", "0.330", "dev"])
def test_untested_versions_of_vllm_are_refused(version: str) -> None:
    problem = seams.version_problem(version)
    assert problem is not None
    assert "install vLLM 0.32 or 0.33, or set" in problem
    assert seams.ALLOW_UNTESTED in problem
    assert seams.version_problem("0.32.1") is None
    assert seams.version_problem("0.32") is None
    assert seams.version_problem("0.33.0+cpu") is None


def test_a_changed_signature_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seams.changed_seams() == []

    def _sample(self: Any, logits: Any, spec_decode_metadata: Any, novelty: Any) -> None: ...

    monkeypatch.setattr(seams.CPUModelRunner, "_sample", _sample)
    assert seams.changed_seams() == [
        "CPUModelRunner._sample now takes (logits, spec_decode_metadata, novelty); edit engine/v1/runner.py"
    ]


def test_an_untested_version_is_refused_with_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures, and bodies against the newest tested version."""
    assert json.loads(seams.BODIES.read_text()).keys() == seams.TESTED_VERSIONS.keys()
    assert seams.changed_bodies() == []

    def _sample(self: Any, logits: Any, spec_decode_metadata: Any, novelty: Any) -> None: ...

    def _sync_device(self: Any) -> None:
        """What it does differs, what it takes does not."""

    monkeypatch.setattr(seams.CPUModelRunner, "_sample", _sample)
    monkeypatch.setattr(seams.CPUModelRunner, "_sync_device", _sync_device)
    monkeypatch.setattr(seams, "version_problem", lambda: "vllm_eagle was not tested with vLLM 0.34.0")
    monkeypatch.delenv(seams.ALLOW_UNTESTED, raising=False)
    with pytest.raises(ValueError, match=r"0\.34\.0") as refusal:
        seams.check_seams.__wrapped__()
    lines = str(refusal.value).split("\n  ")[1:]
    assert any(line.startswith("CPUModelRunner._sample now takes (logits, spec_decode_metadata, novelty)") for line in lines)
    assert any(line.startswith("CPUModelRunner._sync_device has another body") for line in lines)
    assert {line.split()[0] for line in lines} == {"CPUModelRunner._sample", "CPUModelRunner._sync_device"}


def test_comments_and_docstrings_change_no_body() -> None:
    class Plain:
        def method(self, x: int) -> int:
            return x + 1

    class Documented:
        def method(self, x: int) -> int:
            """Says so."""
            # And why.
            return x + 1

    class Other:
        def method(self, x: int) -> int:
            return x + 2

    plain, documented, other = (seams._body(owner, "method") for owner in (Plain, Documented, Other))
    assert plain == documented != other
