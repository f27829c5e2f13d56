"""May this run write to that folder, and is it the run that was started there?"""

import json
from pathlib import Path
from typing import Any

from vllm_eagle.train.run import checkpoint
from vllm_eagle.train.run.card import CARD
from vllm_eagle.train.run.settings import TrainSettings


def check_out(settings: TrainSettings) -> Path | None:
    """The checkpoint to go on from; None where none was written, so that the run begins with its first step.

    Raises:
        ValueError: the folder holds another run, or none where one is to be resumed, or options differ.
    """
    newest = checkpoint.newest(settings.out)
    if not settings.resume:
        # Other processes of this launch may have made the folder already; only a checkpoint or a head is a run.
        if newest is not None or (settings.out / "model.safetensors").exists():
            raise ValueError(f"--out {settings.out} holds a run already; add --resume to go on with it, or name another folder")
        return None
    if not holds_run(settings.out):
        raise ValueError(f"--resume: {settings.out} holds no run; start without --resume")
    before = {"head_layers": 1} | _card(settings.out)["settings"]  # which runs had before there was the option
    changed = [k for k, v in settings.fixed().items() if before.get(k) != json.loads(json.dumps(v))]
    if changed:
        flags = ", ".join("--" + name.replace("_", "-") for name in changed)
        raise ValueError(
            f"--resume: {flags} differ from the run in {settings.out}; resume with the same options, or start a new run"
        )
    return newest


def holds_run(out: Path) -> bool:
    """Whether `--resume` has something to go on from: a run that got as far as its first step."""
    return (out / CARD).exists()


def _card(out: Path) -> dict[str, Any]:
    try:
        card: dict[str, Any] = json.loads((out / CARD).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--resume: {out / CARD} cannot be read ({error}); start a new run in another folder") from None
    return card


def check_same(out: Path, now: dict[str, Any]) -> None:
    """Compare what decides the order of batches and is no option: `data_sha256` and `processes`.

    Raises:
        ValueError: one of them has changed.
    """
    card = _card(out)
    before = {"data_sha256": card["data_sha256"], "processes": card["facts"]["processes"]}
    if before["data_sha256"] != now["data_sha256"]:
        raise ValueError(f"--resume: the data has changed since {out} was started; restore it, or start a new run")
    if before["processes"] != now["processes"]:
        raise ValueError(f"--resume: the run in {out} has {before['processes']} processes, not {now['processes']}; use as many")
