"""One judgement: `inspect`, `convert`, `eval` and serving say the same of every head, before a model is loaded."""

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import models
from tests.heads import cases, heads
from tests.heads.cases import BASES, CASES
from tests.models import VOCAB
from vllm_eagle.heads import draft_vocab
from vllm_eagle.heads import served as serving
from vllm_eagle.heads.convert import convert
from vllm_eagle.heads.form import vllms_form
from vllm_eagle.heads.formats import read_head
from vllm_eagle.heads.inspect import inspect
from vllm_eagle.heads.judge import judge
from vllm_eagle.heads.served import served
from vllm_eagle.heads.target import Target
from vllm_eagle.options.engine_args import engine_args, serve_head
from vllm_eagle.train.features.target import FrozenTarget
from vllm_eagle.train.head.files import load_head

NUM_RANDOM = 240


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.random_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="module")
def frozen(target: Path) -> FrozenTarget:
    return FrozenTarget(target, torch.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(serving, "cache", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def said(call: Any, *arguments: Any) -> str | None:
    """What a call refuses with; None: it does not."""
    try:
        call(*arguments)
    except ValueError as error:
        return str(error)
    return None


def assert_all_say_the_same(folder: Path, target: Path, frozen: FrozenTarget, out: Path) -> str:
    """Returns the verdict; `unreadable` stands for a refusal before there is anything to judge."""
    unreadable = said(read_head, folder)
    refusals = {
        "serving": said(serve_head, folder, target),
        "convert": said(convert, folder, out, "vllm", target, None),
        "eval, train --init": said(load_head, folder, frozen),
    }
    if unreadable is not None:
        assert said(inspect, folder, target) == unreadable
        assert all(refusal is not None and unreadable in refusal for refusal in refusals.values()), refusals
        return "unreadable"
    found = inspect(folder, target)
    if found["verdict"] == "does not fit":
        reason = [*found["wrong"], *found["misfits"]][0]
        assert all(refusal is not None and reason in refusal for refusal in refusals.values()), (reason, refusals)
        return "does not fit"
    assert refusals == {"serving": None, "convert": None, "eval, train --init": None}
    given = served(folder, Target.read(target))
    assert (given.folder == folder) == (found["verdict"] == "fits") == (given.why is None)
    assert given.why == (found["converted"] or [None])[0]
    for written in (given.folder, out):  # what vLLM gets needs nothing more
        again = judge(read_head(written), Target.read(target))
        assert (again.verdict, again.differences) == ("fits", ())
    assert_same_form(given.folder, folder)
    return str(found["verdict"])


def assert_same_form(one: Path, other: Path) -> None:
    """vLLM builds the same head from both: equal settings and equal tensors."""
    (settings, tensors), (theirs, others) = vllms_form(read_head(one)), vllms_form(read_head(other))
    assert settings == theirs
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", CASES)
def test_every_case_has_its_verdict_everywhere(name: str, target: Path, frozen: FrozenTarget, tmp_path: Path) -> None:
    base, changes, verdict, words = CASES[name]
    folder = BASES[base].write(tmp_path / "head", *changes)
    assert assert_all_say_the_same(folder, target, frozen, tmp_path / "out") == verdict
    found = inspect(folder, target)
    assert words in " ".join([*found["wrong"], *found["misfits"], *found["converted"]][:1])


@pytest.mark.parametrize("seed", range(NUM_RANDOM))
def test_any_head_has_one_verdict(seed: int, target: Path, frozen: FrozenTarget, tmp_path: Path) -> None:
    base, changes, what = cases.random_case(seed, target)
    folder = base.write(tmp_path / "head", *changes)
    print(what)
    assert_all_say_the_same(folder, target, frozen, tmp_path / "out")


def test_random_heads_have_all_verdicts(target: Path, frozen: FrozenTarget, tmp_path: Path) -> None:
    found = set()
    for seed in range(40):
        base, changes, _ = cases.random_case(seed, target)
        folder = base.write(tmp_path / str(seed), *changes)
        unreadable = said(read_head, folder) is not None
        found.add("unreadable" if unreadable else judge(read_head(folder), Target.read(target)).verdict)
    assert found == {"fits", "fits after convert", "does not fit", "unreadable"}


# What is damaged in form only means the same as the whole head.
SAME = {
    "the target's number of layers": "vllm-3",
    "no number of layers, EAGLE-1": "vllm-1",
    "no number of layers, EAGLE-3": "specforge-3",
    "Mistral": "vllm-1",
    "Qwen2": "vllm-1",
    "Qwen3": "vllm-1",
    "padded rows": "vllm-3",
    "nested as older vLLM wrote it": "safeailab-1",
    "one prefix, EAGLE-1": "vllm-1",
    "one prefix, EAGLE-3": "vllm-3",
    "one prefix before midlayer": "specforge-3",
    "speculators without hidden_act": "speculators-3",
    "angles that every loader computes": "vllm-1",
    "null where vLLM wants none": "vllm-3",
    "code to run": "vllm-3",
}


@pytest.mark.parametrize("name", SAME)
def test_what_is_mended_is_the_whole_head_again(name: str, target: Path, tmp_path: Path) -> None:
    folder = BASES[CASES[name][0]].write(tmp_path / "head", *CASES[name][1])
    whole = BASES[SAME[name]].write(tmp_path / "whole")
    assert_same_form(served(folder, Target.read(target)).folder, whole)


def test_a_copy_of_the_targets_lm_head_is_dropped_and_another_refused(target: Path, frozen: FrozenTarget, tmp_path: Path) -> None:
    copy = BASES["vllm-1"].write(tmp_path / "copy", cases.lm_head_of(target))
    assert assert_all_say_the_same(copy, target, frozen, tmp_path / "out") == "fits after convert"
    assert "lm_head.weight" not in load_file(served(copy, Target.read(target)).folder / "model.safetensors")
    half = BASES["vllm-1"].write(
        tmp_path / "half", cases.tensor("lm_head.weight", lambda: load_file(target / "model.safetensors")["lm_head.weight"].half())
    )
    assert inspect(half, target)["verdict"] == "fits after convert"  # rounded is copied
    other = BASES["vllm-1"].write(tmp_path / "other", cases.lm_head_of(target, 1.5))
    assert assert_all_say_the_same(other, target, frozen, tmp_path / "no") == "does not fit"
    assert inspect(copy, None)["wrong"] == [
        "lm_head.weight in an EAGLE-1 head, which drafts with the target's; give --target, to see whether it is a copy"
    ]


@pytest.mark.parametrize(("pickled", "shards"), [(True, 1), (True, 2), (False, 2)])
def test_files_of_any_kind_are_served(pickled: bool, shards: int, target: Path, tmp_path: Path) -> None:
    folder = BASES["vllm-1"].write(tmp_path / "head", pickled=pickled, shards=shards)
    given = served(folder, Target.read(target))
    assert (given.why is not None) == pickled
    assert_same_form(given.folder, folder)


def test_weights_that_vllm_would_read_besides_are_left_out(target: Path, tmp_path: Path) -> None:
    folder = BASES["vllm-1"].write(tmp_path / "head", shards=2)
    (folder / "model.safetensors.index.json").rename(folder / "other.safetensors.index.json")
    heads.save_file({"fc.weight": torch.ones(1)}, folder / "optimizer.safetensors")
    given = served(folder, Target.read(target))
    assert given.why == "vLLM would read optimizer.safetensors, too, which the index leaves out"
    assert_same_form(given.folder, folder)


def test_a_target_that_keeps_its_embedding_elsewhere_fits_no_head(tmp_path: Path) -> None:
    """GPT-2, OPT: seen in the names of the weights."""
    head = BASES["vllm-1"].write(tmp_path / "head")
    names = {
        "transformer.wte.weight": "embedding in transformer.wte.weight, where no head finds it",
        "model.decoder.embed_tokens.weight": "embedding in model.decoder.embed_tokens.weight",
    }
    for i, (name, words) in enumerate(names.items()):
        folder = heads.write(tmp_path / str(i), models.llama_settings(), {name: torch.ones(2)})
        (reason,) = inspect(head, folder)["misfits"]
        assert words in reason
        with pytest.raises(ValueError, match=r"speculative model .*/head: the target has") as refused:
            serve_head(head, folder)
        assert reason in str(refused.value)
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    (gpt2 / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 128, "n_layer": 2, "vocab_size": VOCAB}))
    with pytest.raises(ValueError, match="lacks hidden_size, num_hidden_layers; EAGLE heads are for decoders laid out like Llama"):
        inspect(head, gpt2)


# --- the cache ----------------------------------------------------------------------------------------------------------------


def test_a_head_is_converted_once_and_again_when_it_changes(target: Path, cache: Path, tmp_path: Path) -> None:
    known = Target.read(target)
    folder = BASES["safeailab-1"].write(tmp_path / "head")
    first = served(folder, known).folder
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert served(folder, known).folder == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    draft_vocab.write(folder, [1, 2], VOCAB)
    second = served(folder, known).folder
    assert second != first
    assert draft_vocab.read(second, VOCAB) == [1, 2]
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"rope_theta": 5e5}))
    third = served(folder, known).folder
    assert {first, second, third} == set(cache.iterdir())


def _serve(folder: Path, target: Path, root: Path) -> str:
    serving.cache = lambda: root  # type: ignore[assignment]
    return str(served(folder, Target.read(target)).folder)


def test_processes_that_convert_at_once_agree(target: Path, cache: Path, tmp_path: Path) -> None:
    folder = BASES["safeailab-1"].write(tmp_path / "head")
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = set(pool.starmap(_serve, [(folder, target, cache)] * 8))
    assert found == {str(only) for only in cache.iterdir()}
    assert len(found) == 1


def test_a_copy_that_another_process_finished_first_is_taken(
    target: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = BASES["safeailab-1"].write(tmp_path / "head")
    rename = Path.rename

    def late(self: Path, out: Path) -> Path:
        os.mkdir(out)
        (out / "config.json").write_text("theirs")
        return rename(self, out)

    monkeypatch.setattr(Path, "rename", late)
    found = served(folder, Target.read(target)).folder
    assert (found / "config.json").read_text() == "theirs"
    assert list(cache.iterdir()) == [found]


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = BASES["safeailab-1"].write(tmp_path / "head")
    (tmp_path / "file").touch()
    monkeypatch.setattr(serving, "cache", lambda: tmp_path / "file" / "heads")
    with pytest.raises(ValueError, match=r"cannot be written .*: run `vllm-eagle convert .*/head NEW_FOLDER`, or set XDG"):
        engine_args(folder)


def test_a_head_is_named_by_the_hub_too(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub's own cache, as without a network."""
    import huggingface_hub

    folder = BASES["safeailab-1"].write(tmp_path / "head", pickled=True)
    asked: list[Any] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], options["allow_patterns"]))
        if name != "someone/EAGLE-head":
            raise OSError("no such repository")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    settings = engine_args("someone/EAGLE-head", 8, target)["speculative_config"]
    assert settings["method"] == "eagle"
    assert_same_form(Path(settings["model"]), folder)
    assert asked == [("someone/EAGLE-head", None, ["*.json", pattern]) for pattern in ("*.safetensors", "*.bin")]
    with pytest.raises(ValueError, match=r"no such folder, and no such head on the hub \(no such repository\)"):
        engine_args("someone/else")


def test_a_method_that_contradicts_the_head_is_refused(target: Path, tmp_path: Path) -> None:
    from vllm_eagle.options.engine_args import speculative_settings

    head = BASES["vllm-3"].write(tmp_path / "head")
    with pytest.raises(ValueError, match=r'speculative method "eagle", but .*/head is a head for "eagle3"; set that, or nothing'):
        speculative_settings({"model": str(head), "method": "eagle"}, {}, target)
