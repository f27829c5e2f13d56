"""The worker's counters in a small file that the server's front end maps: both on one machine, no call between them.

vLLM offers plugins no way to send statistics of their own from a worker to the process that answers /metrics.
"""

import contextlib
import fcntl
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from vllm_eagle.metrics.counters import COUNTS, TreeMetrics

_NAME = "vllm_eagle-{user}-{engine}.stats"
_YOUNG_S = 60


def path_of(instance_id: str) -> Path:
    """Where the engine with this `VllmConfig.instance_id` keeps its counters."""
    memory = Path("/dev/shm")
    folder = memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    return folder / _NAME.format(user=os.getuid(), engine=instance_id)


def create(path: Path) -> np.ndarray:
    """Counters of zero, readable by this user alone.

    Raises:
        OSError: the file cannot be made, for example because somebody else's file has its name, or there is no space left.
    """
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    _remove_orphans(path.parent)
    # Exclusive: whoever else can write to the folder must not choose what we write to.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # held as long as the counters are mapped: says that somebody still counts
        try:
            # Real space: where a sparse file finds none later, the first count ends the process with SIGBUS.
            os.posix_fallocate(descriptor, 0, COUNTS.itemsize)
        except OSError:
            path.unlink()
            raise
        return np.asarray(np.memmap(file, COUNTS, "r+", shape=()))  # counted in every step, and a plain array is quicker


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


def _remove_orphans(folder: Path) -> None:
    """Forget the counters of engines that were killed before they could. A young file may belong to one that is just starting."""
    for path in folder.glob(_NAME.format(user=os.getuid(), engine="*")):
        with contextlib.suppress(OSError):  # locked, or gone
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            with os.fdopen(descriptor) as file:
                if time.time() - os.fstat(descriptor).st_mtime > _YOUNG_S:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
