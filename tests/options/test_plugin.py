"""Installing the plugin changes nothing for those who do not ask for trees."""

import logging
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.exceptions import VLLMValidationError
from vllm.usage.usage_lib import UsageContext

from tests.engine.engines import ENGINE, trees
from tests.heads import heads
from tests.serving.fake_engine import Engine
from vllm_eagle import plugin
from vllm_eagle.engine.seams import chat_stream
from vllm_eagle.options.devices import CPU, is_tree_mode


def engine_config(model: Path, **changes: Any) -> Any:
    return EngineArgs(model=str(model), **(ENGINE | changes)).create_engine_config()


def test_registering_twice_wraps_once() -> None:
    plugin.register()
    before = EngineArgs.create_engine_config
    plugin.register()
    assert EngineArgs.create_engine_config is before


def test_without_tree_options_nothing_changes(random_models: dict[str, Path]) -> None:
    target, head = random_models["target"], random_models["eagle"]
    chain = {"method": "eagle", "model": str(head), "num_speculative_tokens": 3}
    for changes in ({}, {"speculative_config": chain}, {"additional_config": {"other": 1}}):
        plugin.register()
        found = engine_config(target, **changes)
        original = EngineArgs.create_engine_config._vllm_eagle_wraps  # type: ignore[attr-defined]
        expected = original(EngineArgs(model=str(target), **(ENGINE | changes)))
        assert found.parallel_config.worker_cls == expected.parallel_config.worker_cls != CPU.worker_cls
        assert found.compute_hash() == expected.compute_hash()
        spec = found.speculative_config
        assert not is_tree_mode(spec)
        if spec is not None:
            assert not spec.disable_padded_drafter_batch
            with pytest.raises(VLLMValidationError, match="not yet supported with speculative decoding"):
                SamplingParams(min_p=0.1)._validate_spec_decode(spec)


def test_servers_with_trees_are_prepared_and_nothing_else(random_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Any] = []
    monkeypatch.setattr(plugin, "_prepare_server", prepared.append)
    with_trees = trees(random_models["eagle"])
    for usage, changes in ((UsageContext.OPENAI_API_SERVER, {}), (UsageContext.LLM_CLASS, with_trees), (None, with_trees)):
        EngineArgs(model=str(random_models["target"]), **(ENGINE | changes)).create_engine_config(usage)
    assert prepared == []
    args = EngineArgs(model=str(random_models["target"]), **(ENGINE | with_trees))
    assert prepared == [args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)]


def test_a_server_is_prepared_once_and_told_what_no_plugin_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vllm.vllm_eagle.plugin").addHandler(handler)
    config = Engine().vllm_config
    plugin._prepare_server(config)
    before = getattr(OpenAIServingChat, chat_stream()), OpenAIServingResponses._process_simple_streaming_events
    assert all(hasattr(method, "_vllm_eagle_wraps") for method in before)
    assert said == []
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    plugin._prepare_server(config)
    assert (getattr(OpenAIServingChat, chat_stream()), OpenAIServingResponses._process_simple_streaming_events) == before
    assert len(said) == 1
    assert "Rust front end runs no plugins" in said[0]
    logging.getLogger("vllm.vllm_eagle.plugin").removeHandler(handler)


def test_tree_options_fill_in_the_rest(random_models: dict[str, Path]) -> None:
    found = engine_config(random_models["target"], **trees(random_models["eagle3"], 12, topk=4))
    assert found.parallel_config.worker_cls == CPU.worker_cls
    assert found.speculative_config.method == "eagle3"
    assert found.speculative_config.num_speculative_tokens == 12
    assert not found.scheduler_config.async_scheduling
    assert is_tree_mode(found.speculative_config)
    SamplingParams(min_p=0.1, logit_bias={3: 1.0})._validate_spec_decode(found.speculative_config)


def test_vllms_short_flags_and_speculative_config_may_not_contradict(random_models: dict[str, Path]) -> None:
    changes = trees(random_models["eagle"]) | {"speculative_config": {"model": "x"}}
    with pytest.raises(ValueError, match="--spec-model and speculative_config"):
        engine_config(random_models["target"], **changes)


def test_a_head_of_speculators_in_place_of_a_model_says_how_to_get_trees(
    random_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verifier = {"name_or_path": str(random_models["target"]), "architectures": ["LlamaForCausalLM"]}
    proposal = {"proposal_type": "greedy", "speculative_tokens": 3}
    settings: dict[str, Any] = {"algorithm": "eagle3", "proposal_methods": [proposal], "verifier": verifier}
    weights = heads.eagle3_weights("layers.0.")
    head = heads.write(tmp_path / "head", heads.speculators_settings(speculators_config=settings), weights)
    told: list[str] = []
    logger = logging.getLogger("vllm.vllm_eagle.plugin")
    monkeypatch.setattr(logger, "info", lambda message, *values: told.append(message % values))
    plugin._if_a_head_is_served(EngineArgs(model=str(head)))
    assert told == [
        f"{head} is an EAGLE head, which vLLM serves with chains for {verifier['name_or_path']}. For draft trees: "
        f"vllm serve {verifier['name_or_path']} --speculative-model {head}"
    ]
    settings["verifier"] = {"name_or_path": None, "architectures": []}
    alone = heads.write(tmp_path / "alone", heads.speculators_settings(speculators_config=settings), weights)
    with pytest.raises(ValueError, match=r"alone: an EAGLE head, and it names no target; serve the target: vllm serve TARGET"):
        engine_config(alone)
