"""A checkpoint folder: config.json and weights, as safetensors or as a pickle of tensors, in one file or in shards.

Pickles are read by torch's restricted unpickler, which builds tensors and runs nothing. Only safetensors is ever written.
"""

import json
import pickle
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eagle import files
from vllm_eagle.heads import draft_vocab

if TYPE_CHECKING:
    import torch

WEIGHTS, CONFIG = "model.safetensors", "config.json"
COMPANIONS = (draft_vocab.FILE,)  # files beside the weights that belong to a head


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        ValueError: the folder or the file is missing, or no JSON object.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder that holds config.json and the weights")
    return _json_object(folder / CONFIG)


def has_weights(folder: Path) -> bool:
    """Whether there is a file with weights."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: safetensors if there are any, else pickles; of shards, those that the index names.

    Raises:
        ValueError: there are none, or a shard is missing.
    """
    for pattern in ("*.safetensors", "pytorch_model*.bin", "*.bin"):
        # "model.safetensors.index.json" before other publications of the same weights, such as "consolidated".
        indices = sorted(folder.glob(f"{pattern}.index.json"), key=lambda file: (not file.name.startswith("model"), file.name))
        index = next(iter(indices), None)
        found = sorted(folder.glob(pattern))
        if index is not None:
            return _shards(index)
        if found:
            return found
    raise ValueError(f"{folder}: no weights (*.safetensors or *.bin) beside config.json; download the checkpoint again")


def _shards(index: Path) -> list[Path]:
    names = _json_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index}: has no weight_map; download the checkpoint again")
    files = [index.parent / str(name) for name in sorted(set(names.values()))]
    for file in files:
        if file.parent != index.parent:
            raise ValueError(f"{index}: names a file outside its folder ({file}); download the checkpoint from its source again")
        if not file.is_file():
            raise ValueError(f"{file}: missing, though {index.name} names it; download the checkpoint again")
    return files


def tensor_names(folder: Path) -> set[str]:
    """Names of all tensors, without reading their values."""
    names: set[str] = set()
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with _safetensors(file) as opened:
                names |= set(opened.keys())
        else:
            names |= set(_pickled(file, values=False))
    return names


def read_tensors(folder: Path, only: Iterable[str] | None = None) -> "dict[str, torch.Tensor]":
    """All tensors by name, or those of `only` that exist; values and dtypes as stored.

    Raises:
        ValueError: a file is broken, holds anything but tensors, or repeats a name of another file.
    """
    wanted = None if only is None else set(only)
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with _safetensors(file) as opened:
                names = set(opened.keys())
                found = {name: opened.get_tensor(name) for name in (names if wanted is None else names & wanted)}
        else:
            found = {name: tensor for name, tensor in _pickled(file, values=True).items() if wanted is None or name in wanted}
        for name in found.keys() & tensors.keys():
            raise ValueError(f"{file}: {name} is in another weight file too; keep only one copy of the weights in {folder}")
        tensors |= found
    return tensors


@contextmanager
def _safetensors(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: no readable safetensors file ({_first_line(error)}); download it again") from None


def _pickled(file: Path, *, values: bool) -> "dict[str, torch.Tensor]":
    import torch

    try:
        # Mapped into memory, values of the current zip format are not read unless they are used.
        device = "cpu" if values else "meta"
        state = torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:
        raise ValueError(
            f"{file}: refused, it is broken or holds Python objects besides tensors, and such objects can run code; "
            "get the head as safetensors or as a plain dict of tensors"
        ) from None
    except Exception as error:  # whatever a broken stream of instructions makes the unpickler do
        raise ValueError(f"{file}: no readable torch checkpoint ({_first_line(error)}); download it again") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise ValueError(f"{file}: holds something besides tensors by name; save the head's state_dict alone")
    return state


def check_output(folder: Path) -> None:
    """Refuse to write where something is.

    Raises:
        ValueError: `folder` is a file, or not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not an empty folder; name a new one, nothing is overwritten")


def write(folder: Path, config: Mapping[str, Any], tensors: "Mapping[str, torch.Tensor]") -> None:
    """Write weights and config.json, each whole or not at all, the weights first: no loader takes them alone for a checkpoint.

    Raises:
        ValueError: the folder is taken.
        files.WriteError: it cannot be written.
    """
    from safetensors.torch import save_file

    check_output(folder)
    apart = _apart(tensors)
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with files.whole(folder / CONFIG) as settings, files.whole(folder / WEIGHTS) as weights:  # the inner one gets its name first
        settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(apart, weights, metadata={"format": "pt"})


def _apart(tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """The tensors as safetensors takes them: no two share memory. Only what does, and what is not contiguous, is copied."""
    apart = {name: tensor.contiguous() for name, tensor in tensors.items()}
    end = 0
    for name in sorted(apart, key=lambda name: apart[name].data_ptr()):
        start = apart[name].data_ptr()
        if start < end:
            apart[name] = apart[name].clone()
        end = max(end, start + tensors[name].nbytes)
    return apart


def companions(folder: Path) -> list[Path]:
    """Files of the folder that belong to a head besides config.json and the weights."""
    return [folder / name for name in COMPANIONS if (folder / name).is_file()]


def copy_companions(source: Path, out: Path) -> None:
    """Copy them from one head to another."""
    for file in companions(source):
        shutil.copy(file, out / file.name)


def _json_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: missing; give the folder of a whole checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: no JSON ({error}); repair or download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds no JSON object; repair or download it again")
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
