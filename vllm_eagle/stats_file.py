"""The worker's counters in a small file that the server's front end maps: both on one machine, no call between them.

vLLM offers plugins no way to send statistics of their own from a worker to the process that answers /metrics.
"""

import contextlib
import os
import tempfile
from pathlib import Path

import numpy as np

from vllm_eagle.metrics import COUNTS, TreeMetrics


def path_of(instance_id: str) -> Path:
    """Where the engine with this `VllmConfig.instance_id` keeps its counters."""
    memory = Path("/dev/shm")
    folder = memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    return folder / f"vllm_eagle-{os.getuid()}-{instance_id}.stats"


def create(path: Path) -> np.ndarray:
    """Counters of zero, readable by this user alone.

    Raises:
        OSError: the file cannot be made, for example because somebody else's file has its name.
    """
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    # Exclusive: whoever else can write to the folder must not choose what we write to.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        file.truncate(COUNTS.itemsize)
        return np.memmap(file, COUNTS, "r+", shape=())


def read(path: Path) -> np.ndarray:
    """The counters of another process, as they are at each look.

    Raises:
        OSError, ValueError: there is no such file, or it holds something else.
    """
    return np.memmap(path, COUNTS, "r", shape=())


def look(path: Path) -> TreeMetrics:
    """A copy of the counters of another process, which goes on counting.

    Raises:
        OSError, ValueError: there is no such file, or it holds something else.
    """
    return TreeMetrics(np.array(read(path)))


def remove(path: Path) -> None:
    """Forget the counters."""
    with contextlib.suppress(OSError):
        path.unlink()
