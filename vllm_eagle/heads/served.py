"""The folder that vLLM gets for a head: the head's own, or, where vLLM would misread that, a converted copy in a cache.

The cache is $XDG_CACHE_HOME/vllm_eagle/heads, or ~/.cache/vllm_eagle/heads. A copy is named by what it holds, so it is never out of
date, and it appears whole or not at all: of two processes that write the same one, the second finds it there. All of it may be
deleted at any time that no server starts.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eagle import files
from vllm_eagle.heads import checkpoint
from vllm_eagle.heads.formats import REPLAYED_ARCHITECTURES, Kind, read_config, read_head

if TYPE_CHECKING:
    import torch

    from vllm_eagle.heads.target import Target


@dataclass(frozen=True, slots=True)
class Served:
    """What vLLM is given."""

    folder: Path
    kind: Kind
    why: str | None  # it is a converted copy; None: it is the head's own folder


def served(folder: Path, target: "Target | None") -> Served:
    """Judge a head and find the folder to serve it from, converting it if that is what it takes.

    Raises:
        ValueError: the head is unreadable or does not fit; or it has to be converted and the cache cannot be written.
    """
    from vllm_eagle.heads.form import vllms_form
    from vllm_eagle.heads.judge import judge

    if any(name in REPLAYED_ARCHITECTURES for name in read_config(folder).get("architectures") or []):
        return Served(folder, "EAGLE-1", None)  # settings without weights, for measurements
    head = read_head(folder)
    found = judge(head, target)
    refusal = found.refusal()
    if refusal:
        raise ValueError(f"{folder}: {refusal}")
    if not found.differences:
        return Served(folder, head.kind, None)
    try:
        return Served(_cached(folder, *vllms_form(head)), head.kind, found.differences[0])
    except (OSError, files.WriteError) as error:
        raise ValueError(
            f"{folder}: {found.differences[0]}; it would be converted, but {error.filename or 'the cache'} cannot be written "
            f"({error.strerror or error}): run `vllm-eagle convert {folder} NEW_FOLDER`, or set XDG_CACHE_HOME"
        ) from None


def cache() -> Path:
    """Where converted heads are kept.

    Raises:
        OSError: the user has no home, and XDG_CACHE_HOME is not set.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm_eagle" / "heads"
    except RuntimeError as error:
        raise OSError(str(error)) from None


def _cached(source: Path, config: Mapping[str, Any], tensors: "Mapping[str, torch.Tensor]") -> Path:
    out = cache() / f"{source.name}-{_digest(source, config, tensors)}"
    if (out / checkpoint.CONFIG).is_file():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".", dir=out.parent))
    try:
        checkpoint.write(unfinished, config, tensors)
        checkpoint.copy_companions(source, unfinished)
        unfinished.rename(out)
    except (OSError, files.WriteError):
        if not (out / checkpoint.CONFIG).is_file():  # else another process was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def _digest(source: Path, config: Mapping[str, Any], tensors: "Mapping[str, torch.Tensor]") -> str:
    import torch

    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    for file in checkpoint.companions(source):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:24]
