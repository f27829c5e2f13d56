"""Checkpoints: weights, optimizer, random states and position, complete or absent; the newest two are kept."""

import json
import shutil
from pathlib import Path
from typing import Any

_POSITION = "position.json"


def save(accelerator: Any, out: Path, position: dict[str, Any]) -> None:
    """Write `out/checkpoints/step-N`; called by every process, with the same position."""
    folder = out / "checkpoints" / f"step-{position['step']:08d}"
    unfinished = folder.with_suffix(".unfinished")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (unfinished / _POSITION).write_text(json.dumps(position))
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)  # a checkpoint with this name is complete
        for old in _folders(out)[:-2]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def newest(out: Path) -> Path | None:
    """The newest complete checkpoint below `out`."""
    folders = _folders(out)
    return folders[-1] if folders else None


def load(accelerator: Any, folder: Path) -> dict[str, Any]:
    """Restore the state of every process; returns the position."""
    accelerator.load_state(str(folder))
    position: dict[str, Any] = json.loads((folder / _POSITION).read_text())
    return position


def _folders(out: Path) -> list[Path]:
    return sorted(folder for folder in (out / "checkpoints").glob("step-*") if folder.suffix != ".unfinished")
