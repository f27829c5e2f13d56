"""How a run may end: a full disk, a torn file, a signal, weights that are no numbers. One line each, and nothing half-written."""

import json
import os
import resource
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import random_target
from tests.train.test_train import METHODS, head_for, points, settings
from vllm_eagle import files
from vllm_eagle.cli import main
from vllm_eagle.pair import HEAD
from vllm_eagle.train.features.target import FrozenTarget
from vllm_eagle.train.head.files import load_head, save_head
from vllm_eagle.train.regenerate.journal import Journal
from vllm_eagle.train.run import loop
from vllm_eagle.train.run.loop import train


@pytest.fixture(scope="module")
def target_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_target(tmp_path_factory.mktemp("ends") / "target")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": chr(97 + i) * 20 + "abc" * i}) + "\n" for i in range(12)))
    return path


@contextmanager
def disk_with_room_for(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: what writes it gets an error, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# A full disk


def test_a_file_is_whole_or_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    files.write_text(path, "before")
    with disk_with_room_for(100), pytest.raises(ValueError, match=r"card\.json: cannot be written \(File too large\)"):
        files.write_text(path, "x" * 1000)
    with suppress(KeyboardInterrupt), files.whole(path) as part:
        part.write_text("hal")
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    assert names(tmp_path) == {"card.json"}


def test_convert_on_a_full_disk_leaves_no_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with disk_with_room_for(10_000):
        assert main(["convert", str(HEAD), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vllm-eagle: {tmp_path}/out/model.safetensors: cannot be written (")
    assert error.count("\n") == 1
    assert not names(tmp_path / "out")
    assert main(["convert", str(HEAD), str(tmp_path / "out")]) == 0  # nothing is in the way


@pytest.mark.parametrize("method", METHODS)
def test_a_head_that_finds_no_room_leaves_the_one_before(target_path: Path, tmp_path: Path, method: str) -> None:
    head = head_for(FrozenTarget(target_path, torch.float32), method, torch.arange(100)[None])
    save_head(head, tmp_path / "head", torch.float32)
    before = {path.name: path.read_bytes() for path in (tmp_path / "head").iterdir()}
    with disk_with_room_for(10_000), pytest.raises(ValueError, match=r"model\.safetensors: cannot be written \(File too large\)"):
        save_head(head, tmp_path / "head", torch.bfloat16)
    assert {path.name: path.read_bytes() for path in (tmp_path / "head").iterdir()} == before


def test_training_on_a_full_disk_keeps_the_checkpoints_before(target_path: Path, data: Path, tmp_path: Path) -> None:
    run = settings(target_path, data, tmp_path / "head", steps=4, checkpoint_every=2, holdout=0.0)
    train(replace(run, steps=2), progress=False)
    (run.out / "model.safetensors").unlink()
    again = replace(run, steps=2, resume=True)
    with disk_with_room_for(100_000), pytest.raises(ValueError, match=r"model\.safetensors: cannot be written"):
        train(again, progress=False)
    assert names(run.out / "checkpoints") == {"step-00000002"}
    assert not {name for name in names(run.out) if name.endswith((".part", ".safetensors"))}
    with disk_with_room_for(100_000), pytest.raises(ValueError, match=r"step-00000002: cannot be written \(.*\)") as caught:
        train(replace(run, out=tmp_path / "other"), progress=False)
    assert "\n" not in str(caught.value)
    assert not names(tmp_path / "other" / "checkpoints")


def test_features_that_find_no_room_are_named(target_path: Path, data: Path, tmp_path: Path) -> None:
    run = settings(target_path, data, tmp_path / "head", cache_dir=tmp_path / "cache", cache_gb=0.01)
    with disk_with_room_for(20_000), pytest.raises(ValueError, match=r"features\.0\.bin: cannot be written \(File too large\)"):
        train(run, progress=False)


def test_a_journal_that_finds_no_room_goes_on_later(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out.jsonl", {})
    journal.append([{"a": 1}])
    with disk_with_room_for(50), pytest.raises(ValueError, match=r"out\.jsonl: cannot be written \(File too large\)"):
        journal.append([{"a": "x" * 100}])
    assert Journal(tmp_path / "out.jsonl", {}).rows() == [{"a": 1}]


# Torn files


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "position.json", "random_states_0.pkl"])
def test_a_torn_checkpoint_is_named_and_the_one_before_it(target_path: Path, data: Path, tmp_path: Path, file: str) -> None:
    run = settings(target_path, data, tmp_path / "head", steps=4, checkpoint_every=2, holdout=0.0)
    train(run, progress=False)
    torn = run.out / "checkpoints" / "step-00000004" / file
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    message = rf"{torn}: cannot be read \(.+\); delete {torn.parent}, --resume then goes on from step-00000002"
    with pytest.raises(ValueError, match=message) as caught:
        train(replace(run, resume=True), progress=False)
    assert "\n" not in str(caught.value)


def test_a_torn_run_card_is_named(target_path: Path, data: Path, tmp_path: Path) -> None:
    run = settings(target_path, data, tmp_path / "head", steps=1)
    train(run, progress=False)
    card = run.out / "run_card.json"
    card.write_text(card.read_text()[:100])
    with pytest.raises(ValueError, match=rf"--resume: {card} cannot be read \(.+\); start a new run in another folder"):
        train(replace(run, resume=True), progress=False)


# Signals


def arguments(target_path: Path, data: Path, out: Path, *more: str) -> list[str]:
    found = ["train", "--target", str(target_path), "--data", str(data), "--out", str(out), "--dtype", "float32"]
    return [*found, "--steps", "8", "--batch-tokens", "128", "--log-every", "3", "--warmup", "1", *more]


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int, *signals: int) -> None:
    """This process gets signals in the middle of a step."""
    learn = loop._Run._learn

    def learn_and_kill(self: Any, batch: Any, share: float) -> Any:
        if self.step == step - 1:
            for number in signals:
                os.kill(os.getpid(), number)
        return learn(self, batch, share)

    monkeypatch.setattr(loop._Run, "_learn", learn_and_kill)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_says_how_to_go_on(
    target_path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, number: signal.Signals, status: int
) -> None:
    """In the middle of what the next point of the curves is the mean of, and long before the first checkpoint."""
    words = arguments(target_path, data, tmp_path / "a head")
    assert main(arguments(target_path, data, tmp_path / "whole")) == 0
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["vllm-eagle", *words])
        kill_at(patch, 5, number)
        assert main(words) == status
    assert handlers == [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    line = capsys.readouterr().err.splitlines()[-1]
    stopped, command = line.split("; go on with: ")
    assert stopped == f"vllm-eagle: stopped by {number.name} after step 5, which is saved"
    assert names(tmp_path / "a head" / "checkpoints") == {"step-00000005"}
    assert not (tmp_path / "a head" / "model.safetensors").exists()
    assert shlex.split(command) == ["vllm-eagle", *words, "--resume"]
    assert main(shlex.split(command)[1:]) == 0
    assert points(tmp_path / "a head") == points(tmp_path / "whole")
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "a head"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_signal_at_the_last_step_changes_nothing(target_path: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    kill_at(monkeypatch, 8, signal.SIGTERM)
    assert main(arguments(target_path, data, tmp_path / "head")) == 0
    assert (tmp_path / "head" / "model.safetensors").exists()


def test_who_interrupts_twice_does_not_wait(target_path: Path, data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    words = arguments(target_path, data, tmp_path / "head")
    monkeypatch.setattr(sys, "argv", ["vllm-eagle", *words, "--resume"])
    with monkeypatch.context() as patch:
        kill_at(patch, 2, signal.SIGINT, signal.SIGINT)
        assert main(words) == 130
    assert "stopped by SIGINT; go on with: vllm-eagle train" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0  # nothing was saved: from the first step


def test_a_signal_before_the_first_step_ends_the_run_at_once(
    target_path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = arguments(target_path, data, tmp_path / "head")
    monkeypatch.setattr(sys, "argv", ["vllm-eagle", *words])
    monkeypatch.setattr(loop, "load_tokenizer", lambda target: os.kill(os.getpid(), signal.SIGTERM))
    assert main(words) == 143
    expected = f"vllm-eagle: stopped by SIGTERM; start again with: {shlex.join(['vllm-eagle', *words])}\n"
    assert capsys.readouterr().err.endswith(expected)


# Weights that are no numbers, or torn


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight", "lm_head.weight"])
def test_a_target_with_nan_is_named_with_its_tensor(tmp_path: Path, name: str) -> None:
    target = random_target(tmp_path / "target")
    weights = load_file(target / "model.safetensors")
    weights[name][300 % len(weights[name]), 7] = float("nan")  # of the embedding a token that nothing asks for
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"target .*target: {name} holds NaN or infinity; download the model again") as caught:
        FrozenTarget(target, torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_a_head_with_nan_is_named_with_its_tensor(target_path: Path, tmp_path: Path, method: str) -> None:
    target = FrozenTarget(target_path, torch.float32)
    save_head(head_for(target, method, torch.arange(100)[None]), tmp_path / "head", torch.float32)
    weights = load_file(tmp_path / "head" / "model.safetensors")
    name = min(name for name, weight in weights.items() if weight.ndim == 2)
    weights[name][0, 0] = float("inf")
    save_file(weights, tmp_path / "head" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"--head .*head: {name} holds NaN or infinity"):
        load_head(tmp_path / "head", target)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_torn_target_is_named_in_one_line(tmp_path: Path, data: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    torn = random_target(tmp_path / "target") / file
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    assert main(["train", "--target", str(torn.parent), "--data", str(data), "--out", str(tmp_path / "head")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vllm-eagle: target {torn.parent}: ")
    assert error.count("\n") == 1
    if file == "model.safetensors":
        assert f"{torn} is broken (" in error
