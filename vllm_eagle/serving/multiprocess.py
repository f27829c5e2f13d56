"""Metrics for a /metrics that is made of files: where PROMETHEUS_MULTIPROC_DIR is set, as vLLM itself does for several API servers.

There each process keeps its values in files of that folder and any process adds them up when it is asked; collectors, which make
values when they are asked, are not seen. So a thread of one front end copies ours into files of their own, once a second.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.registry import Collector

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
EVERY_S = 1.0
# Of the files' names, which say how values of several processes are put together. Of gauges the newest counts: the folder may hold
# files of a server that is gone.
_PREFIXES = {"counter": "counter", "histogram": "histogram", "gauge": "gauge_mostrecent"}


class Files:
    """Values of one process, as prometheus_client's multiprocess mode reads them."""

    def __init__(self, folder: Path):
        """Create them.

        Raises:
            OSError: the folder is missing, or cannot be written.
        """
        self._files = {kind: MmapedDict(str(folder / f"{prefix}_eagle{os.getpid()}.db")) for kind, prefix in _PREFIXES.items()}

    def write(self, families: Iterable[Metric]) -> None:
        """Bring the files to these values."""
        for family in families:
            below = 0.0
            for sample in family.samples:
                value = sample.value
                if family.type == "histogram":
                    # The reader adds buckets up, and counts.
                    if sample.name.endswith("_count"):
                        continue
                    if sample.name.endswith("_bucket"):
                        value, below = value - below, value
                key = mmap_key(family.name, sample.name, [*sample.labels], [*sample.labels.values()], family.documentation)
                self._files[family.type].write_value(key, value, time.time())


def copy_to(folder: Path, collector: Collector) -> Callable[[], None]:
    """Start to copy what the collector collects; the function that is returned ends it.

    Raises:
        OSError: the folder is missing, or cannot be written.
    """
    files, end = Files(folder), threading.Event()
    threading.Thread(target=_copy, args=(files, collector, end), name="vllm_eagle metrics", daemon=True).start()
    return end.set


def _copy(files: Files, collector: Collector, end: threading.Event) -> None:
    while True:
        files.write(collector.collect())
        if end.wait(EVERY_S):
            return
