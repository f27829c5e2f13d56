"""A server for a soak test, and what can be seen of a server from outside: its metrics, processes and log."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil  # type: ignore[import-untyped]

START_S = 600
STOP_S = 60
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",  # so that the log has what happened before a kill
    # By default glibc keeps freed tensors and hands them out in pieces, so that memory climbs for an hour without any leak, with
    # and without trees. With fixed thresholds they go back to the system, and what a process holds is what it uses.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 16),
    "MALLOC_ARENA_MAX": "1",  # else each of its many threads keeps pieces of its own
}
# What vLLM's loggers, Python and uvicorn write when something goes wrong.
ERROR_LINE = re.compile(r"\b(ERROR|CRITICAL|Traceback|Exception ignored|Segmentation fault)\b")
_TITLE = re.compile(r"VLLM::(\w+)")


@dataclass(frozen=True, slots=True)
class Sample:
    """A server at one moment."""

    seconds: float  # since the start of the run
    rss_bytes: Mapping[str, int]  # by process: "APIServer 4711"
    num_fds: int
    num_threads: int
    metrics: Mapping[str, float]  # of Prometheus, summed over labels


@contextmanager
def serve(model: str, options: Sequence[str], log: Path) -> Iterator[tuple[str, int]]:
    """Start `vllm serve` in a session of its own and wait until it is healthy; yields its URL and process id.

    Raises:
        ValueError: it did not start; the message has the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", model, "--host", "127.0.0.1", "--port", str(port), *options]
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment | ENVIRONMENT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        if not asyncio.run(_healthy(url, process)):
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            raise ValueError(f"{' '.join(command)}\ndid not start; end of {log}:\n{tail}")
        yield url, process.pid
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_S)


async def _healthy(url: str, process: "subprocess.Popen[bytes]") -> bool:
    until_s = time.monotonic() + START_S
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=5)) as session:
        while time.monotonic() < until_s and process.poll() is None:
            with suppress(aiohttp.ClientError, TimeoutError):
                async with session.get("/health") as response:
                    if response.status == 200:
                        return True
            await asyncio.sleep(0.3)
    return False


async def read_metrics(session: aiohttp.ClientSession) -> dict[str, float]:
    """Prometheus samples, summed over labels."""
    async with session.get("/metrics") as response:
        response.raise_for_status()
        text = await response.text()
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith(("vllm:", "vllm_eagle")):
            name, value = line.split("{")[0].split(" ")[0], float(line.rsplit(" ", 1)[1])
            found[name] = found.get(name, 0.0) + value
    return found


@dataclass(slots=True)
class Watch:
    """Looks at a server again and again."""

    url: str
    pid: int | None  # of the server's first process; None if it is somebody else's
    samples: list[Sample] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)

    async def look(self) -> Sample:
        """One sample, kept.

        Raises:
            aiohttp.ClientError: the server does not answer.
        """
        async with aiohttp.ClientSession(self.url, timeout=aiohttp.ClientTimeout(total=600)) as session:
            metrics = await read_metrics(session)
        processes = _family(self.pid)
        rss, num_fds, num_threads = {}, 0, 0
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # a short-lived helper
                rss[_name(process)] = process.memory_info().rss
                num_fds += process.num_fds()
                num_threads += process.num_threads()
        sample = Sample(round(time.monotonic() - self.started_s, 1), rss, num_fds, num_threads, metrics)
        self.samples.append(sample)
        return sample


def _family(pid: int | None) -> list[psutil.Process]:
    if pid is None:
        return []
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _name(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    title = _TITLE.search(command)
    kind = title[1] if title else ("resource_tracker" if "resource_tracker" in command else "APIServer")
    return f"{kind} {process.pid}"


def error_lines(log: Path) -> list[str]:
    """Lines of a server's log that tell of an error."""
    return [line[:300] for line in log.read_text(errors="replace").splitlines() if ERROR_LINE.search(line)]
