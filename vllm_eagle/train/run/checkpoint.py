"""Checkpoints: weights, optimizer, random states and position, complete or absent; the newest two are kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from vllm_eagle import files

_POSITION = "position.json"


def save(accelerator: Any, out: Path, position: dict[str, Any]) -> None:
    """Write `out/checkpoints/step-N`; called by every process, with the same position.

    Raises:
        ValueError: it cannot be written; the older ones stay.
    """
    folder = out / "checkpoints" / f"step-{position['step']:08d}"
    unfinished = folder.with_suffix(".unfinished")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        with files.writing(folder):
            accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with files.writing(folder):
                (unfinished / _POSITION).write_text(json.dumps(position))
                shutil.rmtree(folder, ignore_errors=True)
                unfinished.rename(folder)  # a checkpoint with this name is complete
    except ValueError:
        shutil.rmtree(unfinished, ignore_errors=True)  # give back what little room is left
        raise
    if accelerator.is_main_process:
        for old in _folders(out)[:-2]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def newest(out: Path) -> Path | None:
    """The newest complete checkpoint below `out`."""
    folders = _folders(out)
    return folders[-1] if folders else None


def load(accelerator: Any, folder: Path) -> dict[str, Any]:
    """Restore the state of every process; returns the position.

    Raises:
        ValueError: a file of it is missing or broken.
    """
    for file in sorted(folder.iterdir()):  # accelerate goes on without random states that it cannot read
        try:
            _read(file)
        except Exception as error:  # each kind of file has errors of its own
            reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
            older = [other.name for other in _folders(folder.parents[1]) if other < folder]
            way_out = f"--resume then goes on from {older[-1]}" if older else "then start without --resume"
            raise ValueError(f"{file}: cannot be read ({reason}); delete {folder}, {way_out}") from None
    accelerator.load_state(str(folder))
    position: dict[str, Any] = json.loads((folder / _POSITION).read_text())
    return position


def _read(file: Path) -> None:
    """Read a file of a checkpoint, but not the values of tensors."""
    from safetensors import safe_open

    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt"):
            pass
    elif file.suffix == ".json":
        json.loads(file.read_text())
    else:
        torch.load(file, map_location="meta", weights_only=False)  # written by this program, and read so by load_state


def _folders(out: Path) -> list[Path]:
    return sorted(folder for folder in (out / "checkpoints").glob("step-*") if folder.suffix != ".unfinished")
