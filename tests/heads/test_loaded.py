"""What is judged to fit, vLLM's own classes take whole: every parameter holds what the file says."""

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig
from vllm import LLM
from vllm.config import SpeculativeConfig, set_current_vllm_config
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from tests.engine.engines import engine, trees
from tests.heads import cases
from tests.heads.cases import BASES, CASES
from tests.tiers import some
from vllm_eagle.engine import loaded
from vllm_eagle.heads import served as serving
from vllm_eagle.heads.form import vllms_form
from vllm_eagle.heads.formats import AUX_LAYERS, read_head
from vllm_eagle.heads.judge import judge
from vllm_eagle.heads.served import served
from vllm_eagle.heads.target import Target


@pytest.fixture(scope="module")
def llm(random_models: dict[str, Path]) -> Iterator[LLM]:
    with engine(random_models["target"], **trees(random_models["eagle"])) as running:
        yield running


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "cache", lambda: tmp_path / "cache")


def load(worker: Any, folder: str, method: str) -> tuple[dict[str, torch.Tensor], bool, bool]:
    """Load a head as a worker does that starts with it: its parameters, and whether embedding and LM head are its own."""
    config = copy.copy(worker.vllm_config)
    config.compilation_config = copy.copy(config.compilation_config)
    config.compilation_config.static_forward_context = {}
    config.speculative_config = SpeculativeConfig(
        model=folder,
        method=method,
        num_speculative_tokens=16,
        target_model_config=config.model_config,
        target_parallel_config=config.parallel_config,
    )
    draft = config.speculative_config.draft_model_config
    with set_current_vllm_config(config), set_default_torch_dtype(draft.dtype):
        head = initialize_model(vllm_config=config, model_config=draft)
        for parameter in head.parameters():
            parameter.data.fill_(torch.nan if parameter.is_floating_point() else -1)
        # Not `get_model`: at its end weights are packed for the CPU's matrix products, and gone.
        get_model_loader(config.load_config).load_weights(head, draft)
    loaded.complete(head, worker.model_runner.get_model(), config)
    parameters = {name: value.detach().clone() for name, value in head.named_parameters(remove_duplicate=False)}
    return parameters, head.has_own_embed_tokens, head.has_own_lm_head


def assert_vllm_holds(llm: LLM, folder: Path, target: Path) -> None:
    head = read_head(folder)
    given = served(folder, Target.read(target))
    method = "eagle" if head.kind == "EAGLE-1" else "eagle3"
    parameters, own_embedding, own_lm_head = llm.collective_rpc(load, args=(str(given.folder), method))[0]
    _, tensors = vllms_form(head)
    taken = set()
    for name, value in parameters.items():
        sources = loaded.sources(name)
        shared = {"embed_tokens.weight": not own_embedding, "lm_head.weight": not own_lm_head}
        if shared.get(sources[0]) or loaded.UNUSED.fullmatch(sources[0]):
            continue
        expected = torch.cat([tensors[source] for source in sources]).to(value.dtype)
        assert torch.equal(value[: len(expected)], expected), name  # vLLM pads vocabularies
        taken |= set(sources)
    assert taken == tensors.keys() - {"t2d"}


FITTING = [name for name, (_, _, verdict, _) in CASES.items() if verdict != "does not fit"]


@pytest.mark.parametrize("name", FITTING)
def test_vllm_takes_all_of_a_head_that_fits(name: str, llm: LLM, random_models: dict[str, Path], tmp_path: Path) -> None:
    assert_vllm_holds(llm, BASES[CASES[name][0]].write(tmp_path / "head", *CASES[name][1]), random_models["target"])


@pytest.mark.parametrize("first", some(range(0, 240, 20), 0, 20))
def test_vllm_takes_all_of_any_head_that_fits(first: int, llm: LLM, random_models: dict[str, Path], tmp_path: Path) -> None:
    target = Target.read(random_models["target"])
    number = 0
    for seed in range(first, first + 20):
        base, changes, what = cases.random_case(seed, target.path)
        folder = base.write(tmp_path / str(seed), *changes)
        try:
            verdict = judge(read_head(folder), target).verdict
        except ValueError:
            continue
        if verdict != "does not fit":
            print(what)
            assert_vllm_holds(llm, folder, target.path)
            number += 1
    assert number


def test_what_gets_no_values_or_goes_nowhere_is_named(llm: LLM, random_models: dict[str, Path], tmp_path: Path) -> None:
    """Behind the judgement: a folder that vLLM is given without it."""
    for base, change, words in (
        ("vllm-3", cases.without("d2t"), "d2t got no values in Eagle3LlamaForCausalLM"),
        ("vllm-1", cases.put(num_hidden_layers=2), "layers.1.* got no values"),
        ("vllm-3", CASES["input_norm without its flag"][1][0], "input_norm.weight went nowhere"),
    ):
        folder = BASES[base].write(tmp_path / f"head{words[:3]}", change)
        with pytest.raises(ValueError, match=words):
            llm.collective_rpc(load, args=(str(folder), "eagle" if base == "vllm-1" else "eagle3"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eagle_config": {AUX_LAYERS: [1, 2, 3]}}, [1, 2, 3]),
        ({"eagle_config": {AUX_LAYERS: [1, 2, 3]}, AUX_LAYERS: [4, 5, 6]}, [4, 5, 6]),
        ({"eagle_config": {"norm_before_fc": True}}, None),
        ({}, None),
    ],
)
def test_target_layers_are_named_where_the_v2_runner_looks(settings: dict[str, Any], expected: list[int] | None) -> None:
    """vLLM's V1 runner reads both places."""
    config = PretrainedConfig(**settings)
    loaded.name_aux_layers(
        SimpleNamespace(speculative_config=SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=config)))
    )  # type: ignore[arg-type]
    assert getattr(config, AUX_LAYERS, None) == expected
