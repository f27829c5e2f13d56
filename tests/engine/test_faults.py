"""What breaks in drafting costs speed, never an answer; what cannot work is refused with its reason."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams

from tests.engine.engines import engine, generate, tokens, tree_stats, trees
from vllm_eagle.engine.v1 import runner
from vllm_eagle.engine.v1.proposer import EagleTreeProposer
from vllm_eagle.heads import served

PROMPTS = [list(range(3 * i + 1, 3 * i + 12 + i)) for i in range(6)]
PARAMS = [SamplingParams(temperature=i % 2, seed=i, max_tokens=24, ignore_eos=True) for i in range(6)]


@pytest.mark.parametrize("in_turns", [False, True])
def test_a_failure_in_drafting_switches_speculation_off(
    random_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, in_turns: bool
) -> None:
    # In turns: prompts come in one step, but a step has room for two trees, so that requests wait with the drafts that they were
    # given long before the failure.
    failing, small = (16, {"max_num_batched_tokens": 40, "max_num_seqs": 8}) if in_turns else (6, {})
    prompts = [prompt[:5] for prompt in PROMPTS] if in_turns else PROMPTS
    with engine(random_models["target"]) as llm:
        expected = tokens(generate(llm, prompts, PARAMS))
    propose, calls = EagleTreeProposer.propose, []

    def fails_later(self: EagleTreeProposer, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == failing:
            raise RuntimeError("injected")
        return propose(self, *args, **kwargs)

    with engine(random_models["target"], **trees(random_models["eagle"]), **small) as llm:
        monkeypatch.setattr(EagleTreeProposer, "propose", fails_later)
        errors: list[str] = []
        monkeypatch.setattr(runner.logger, "exception", lambda message: errors.append(message))
        assert tokens(generate(llm, prompts, PARAMS)) == expected
        assert len(calls) == failing  # not tried again
        assert len(errors) == 1
        assert errors[0].startswith("Drafting failed. Speculation is off")
        stats = tree_stats(llm)
        assert (stats["speculation_off"], stats["num_drafting_errors"]) == (1, 1)
        assert stats["decisions"]["failed"] > 0
        before = stats["num_verifications"]
        llm.collective_rpc("reset_eagle_stats")
        assert tokens(generate(llm, prompts, PARAMS)) == expected
        stats = tree_stats(llm)
        assert before > 0
        assert stats["num_verifications"] == 0
        assert stats["speculation_off"] == 1


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_a_head_that_yields_nan_changes_nothing(random_models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    head = tmp_path / "eagle3-nan" if kind == "eagle3" else tmp_path / "nan"
    shutil.copytree(random_models[kind], head)
    weights = load_file(head / "model.safetensors")
    # A file with NaN in it is refused; products of these overflow, and infinities of both signs add up to NaN.
    weights["fc.weight"] = torch.full_like(weights["fc.weight"], torch.finfo(torch.float32).max)
    save_file(weights, head / "model.safetensors")
    outputs = []
    for changes in ({}, trees(head)):
        with engine(random_models["target"], **changes) as llm:
            outputs.append(tokens(generate(llm, PROMPTS, PARAMS)))
            if changes:
                stats = tree_stats(llm)
    assert outputs[0] == outputs[1]
    assert stats["num_accepted"] == 0
    assert stats["speculation_off"] == 0


def test_a_truncated_head_is_refused_by_name(random_models: dict[str, Path], tmp_path: Path) -> None:
    head = tmp_path / "head"
    shutil.copytree(random_models["eagle"], head)
    weights = (head / "model.safetensors").read_bytes()
    (head / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused = pytest.raises(ValueError, match=r"head/model\.safetensors: no readable safetensors file.*download it again")
    with refused, engine(random_models["target"], **trees(head)):
        pass


class _Payload:
    """Unpickling this would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(random_models: dict[str, Path], tmp_path: Path) -> None:
    head = tmp_path / "head"
    shutil.copytree(random_models["eagle"], head)
    (head / "model.safetensors").unlink()
    torch.save({"fc.weight": _Payload(tmp_path / "ran")}, head / "pytorch_model.bin")
    refused = pytest.raises(ValueError, match=r"pytorch_model\.bin")
    with refused, engine(random_models["target"], **trees(head)):
        pass
    assert not (tmp_path / "ran").exists()


def test_a_head_of_tensors_in_a_pickle_works(
    random_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "cache", lambda: tmp_path / "cache")
    head = tmp_path / "head"
    shutil.copytree(random_models["eagle"], head)
    torch.save(load_file(head / "model.safetensors"), head / "pytorch_model.bin")
    (head / "model.safetensors").unlink()
    outputs = []
    for changes in ({}, trees(head)):
        with engine(random_models["target"], **changes) as llm:
            outputs.append(tokens(generate(llm, PROMPTS, PARAMS)))
    assert outputs[0] == outputs[1]
