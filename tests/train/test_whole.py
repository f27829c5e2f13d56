"""`train` without data: dialogues, head, eval and summary; cut anywhere it goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine.engines import engine, trees
from tests.models import random_target
from tests.tiers import exhaustive
from tests.train.test_own_turns import FakeEngine
from vllm_eagle.bench.engines.offline import encode_prompts, generate
from vllm_eagle.cli import main
from vllm_eagle.pair import TARGET
from vllm_eagle.train.data.report import DataReport
from vllm_eagle.train.regenerate.command import regenerate
from vllm_eagle.train.regenerate.rewrite import Settings
from vllm_eagle.train.run import checkpoint, own_data, whole
from vllm_eagle.train.run.settings import TrainSettings

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + ('<|user|>\n' if m.role == 'user' else '') + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = random_target(tmp_path_factory.mktemp("whole") / "target")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(autouse=True)
def short_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "EVAL_TURNS", 4)
    monkeypatch.setattr(whole, "EVAL_TOKENS", 12)


class Killed(Exception):  # noqa: N818
    pass


def settings(target: Path, out: Path, **changes: Any) -> TrainSettings:
    base = TrainSettings(
        str(target), (), out, steps=4, batch_tokens=512, warmup=1, dtype="float32", log_every=1, checkpoint_every=2
    )
    return replace(base, **changes)


def writes(dies_at: int | None = None) -> Callable[[Settings], None]:
    """What writes the dialogues, without an engine, four at a time; dies after a number of calls."""

    def write(asked: Settings) -> None:
        fake = FakeEngine(dies_at=dies_at, answer=lambda text: "It is the next one, and so on.")
        try:
            regenerate(replace(asked, chunk=4), DataReport(), fake.open, progress=False)
        except KeyboardInterrupt:
            raise Killed from None

    return write


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("changes", [{}, {"method": "eagle3", "draft_vocab": 64}, {"draft_vocab": 64}])
def test_a_head_from_the_model_alone(target: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    run = settings(target, tmp_path / "a head", **changes)
    summary = whole.train_from_nothing(run, 24, writes(), progress=False)
    card = json.loads((run.out / "run_card.json").read_text())
    dialogues = lines(run.out / "self" / "dialogues.jsonl")
    prompts, train = lines(run.out / "self" / "prompts.jsonl"), lines(run.out / "self" / "train.jsonl")
    assert len(dialogues) == 24
    assert sorted(path.name for path in (run.out / "self").glob("*features*")) == []
    assert json.loads((run.out / "self" / "dialogues.jsonl.meta.json").read_text())["turns"] == 2
    assert len(train) == 16
    asked = {row["messages"][0]["content"] for row in prompts}
    assert asked == {row["messages"][0]["content"] for row in dialogues} - {row["messages"][0]["content"] for row in train}
    assert [len(row["messages"]) for row in prompts] == [1, 3] * 8
    assert card["result"]["tokens"] > 0
    assert card["self"]["dialogues"] == 24
    assert f"--data '{run.out}/self/dialogues.jsonl'" in card["self"]["readme"]
    assert card["eval"] | {"seconds": 0} == json.loads((run.out / "eval" / "eval.json").read_text()) | {"seconds": 0}
    assert card["eval"]["prompts"] == 4
    assert set(card["eval"]["trees"]) == {"tree16", "chain3", "chain5"}
    assert f"tau                 {card['eval']['trees']['tree16']['tau']:.2f} (tree16), " in summary
    for line in (r"^alpha( +\d){5}$", r"^teacher-forced( +0\.\d{3}){5}$", r"^free-running( +0\.\d{3}){5}$", r"^cost +data \d+ s"):
        assert re.search(line, summary, re.M), line
    assert summary.splitlines()[-1] == f"serve it            vllm serve {target} --speculative-model '{run.out}'"
    # What is there already is not written again; the dialogues feed another run, too.
    called: list[Settings] = []
    with pytest.raises(ValueError, match="holds a run already; add --resume"):
        whole.train_from_nothing(run, 24, called.append, progress=False)
    assert not called
    assert main(["train", "--target", str(target), "--data", str(run.out / "self" / "dialogues.jsonl"), "--out",
                 str(tmp_path / "second"), "--steps", "1", "--dtype", "float32"]) == 0  # fmt: skip


def test_a_run_killed_anywhere_goes_on(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, again = settings(target, tmp_path / "head"), settings(target, tmp_path / "head", resume=True)

    def dies(*_: object) -> None:
        raise Killed

    def killed(given: TrainSettings, write: Callable[[Settings], None], module: Any, name: str, does: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, does)
            with pytest.raises(Killed):
                whole.train_from_nothing(given, 20, write, progress=False)

    killed(run, writes(dies_at=9), whole, "evaluate", None)  # in the third chunk of dialogues
    first = lines(run.out / "self" / "dialogues.jsonl")
    assert len(first) == 8
    killed(run, writes(), checkpoint, "save", dies)  # before the first checkpoint; until then it goes on without --resume, too
    dialogues = lines(run.out / "self" / "dialogues.jsonl")
    assert len(dialogues) == 20
    assert dialogues[:8] == first
    real_save = checkpoint.save
    killed(again, writes(), checkpoint, "save", lambda *given: (real_save(*given), dies()))  # after it
    assert {path.name for path in (run.out / "checkpoints").iterdir()} == {"step-00000002"}
    killed(again, writes(), whole, "evaluate", dies)
    assert [point["step"] for point in lines(run.out / "metrics.jsonl") if point["kind"] == "train"] == [1, 2, 3, 4]
    assert "serve it" in whole.train_from_nothing(again, 20, writes(), progress=False)
    assert lines(run.out / "self" / "dialogues.jsonl") == dialogues
    with pytest.raises(ValueError, match="--resume: --lr differ"):
        whole.train_from_nothing(replace(again, lr=1.0), 20, writes(), progress=False)


def test_a_signal_while_dialogues_are_written_says_how_to_go_on(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--target", str(target), "--out", str(tmp_path / "head"), "--self", "20"]
    monkeypatch.setattr(sys, "argv", ["vllm-eagle", *words])
    monkeypatch.setattr(own_data, "write", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(words) == 143
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"vllm-eagle: stopped by SIGTERM; go on with: vllm-eagle {' '.join(words)} --resume"


def test_what_cannot_be_is_refused_before_anything_is_written(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*options: str, model: Path = target) -> str:
        assert main(["train", "--target", str(model), "--out", str(tmp_path / "head"), *options]) == 2
        assert not (tmp_path / "head").exists()
        error = capsys.readouterr().err
        assert error.startswith("vllm-eagle: ")
        assert error.count("\n") == 1
        return error

    assert "--self is 3; a head needs at least 16 dialogues" in refused("--self", "3")
    assert "--data and --self exclude each other; remove one" in refused("--self", "30", "--data", "x.jsonl")
    assert "--lr must be positive" in refused("--lr", "0")
    assert "nowhere: transformers cannot read its config" in refused(model=tmp_path / "nowhere")
    layers = refused("--method", "eagle3", "--aux-layers", "1", "2", "9")
    assert "--aux-layers [1, 2, 9]: choose numbers from 0 to 4" in layers
    assert "nohead" in refused("--init", str(tmp_path / "nohead"))
    mute = shutil.copytree(target, tmp_path / "mute")
    (mute / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert "puts nothing before a user's turn" in refused(model=mute)
    (mute / "chat_template.jinja").unlink()
    assert "the tokenizer has no chat template; put" in refused(model=mute)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert f"run `vllm-eagle regenerate --target {target} --self 30 --out FILE` first" in refused("--self", "30")


def test_errors_of_the_process_that_writes_come_out_of_it(tmp_path: Path) -> None:
    asked = Settings(str(TARGET), (), tmp_path / "nowhere" / "out.jsonl", own=3)
    with pytest.raises(ValueError, match="its folder does not exist"):
        own_data.write_in_a_child(asked)


# As the target has it, and words that it never saw there.
OTHER_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|user|>\nQuestion: ' if m.role == 'user' else '<|assistant|>\nAnswer: ' }}"
    "{{ m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\nAnswer:' }}{% endif %}"
)


def processes_of(group: int) -> list[str]:
    """Running processes of a session."""
    found = subprocess.run(["ps", "-eo", "sid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in found.splitlines()]
    return [args for sid, state, args in rows if int(sid) == group and not state.startswith("Z")]


@exhaustive
def test_a_chat_model_never_met_gets_a_head_from_one_command(tmp_path: Path) -> None:
    """As a user types it; killed while it writes its dialogues, which leaves no process behind, and gone on with."""
    from vllm import SamplingParams

    target, head = shutil.copytree(TARGET, tmp_path / "target"), tmp_path / "head"
    (target / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    command = [sys.executable, "-m", "vllm_eagle.cli", "train", "--target", str(target), "--out", str(head), "--self", "300"]
    command += ["--steps", "60", "--batch-tokens", "2048", "--lr", "2e-3", "--warmup", "10", "--dtype", "float32"]
    first = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    written = head / "self" / "dialogues.jsonl"
    wait_until(lambda: written.exists() and written.read_bytes().endswith(b"\n"), 600)
    assert len(processes_of(first.pid)) > 1
    first.kill()
    first.wait()
    wait_until(lambda: not processes_of(first.pid), 60)
    before = written.read_text()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert written.read_text().startswith(before)
    assert len(lines(written)) == 300
    card = json.loads((head / "run_card.json").read_text())
    assert card["eval"]["alpha_teacher_forced"][0] > 0.25, done.stdout  # 0.36 and 0.42 when this was written
    assert done.stdout.splitlines()[-1].endswith(f"vllm serve {target} --speculative-model {head}")
    prompts = encode_prompts(str(target), head / "self" / "prompts.jsonl", card["eval"]["prompts"])
    with engine(target, **trees(head), max_model_len=1024) as llm:
        tau = generate(llm, prompts, [SamplingParams(temperature=0, max_tokens=128)] * len(prompts)).tau
    assert tau > 1.3
    assert tau == pytest.approx(card["eval"]["trees"]["tree16"]["tau"], rel=0.05)


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.2)
