"""Run `vllm serve` as users do, in processes of its own, and talk to it over HTTP."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests import starts
from vllm_eagle.pair import HEAD, TARGET

VLLM = Path(sys.executable).with_name("vllm")
MODEL = "shipped"  # the name under which the model is served
MAX_MODEL_LEN = 512
TREES = ("--speculative-model", str(HEAD), "--num-speculative-tokens", "16", "--no-speculative-tree-budget")
OPTIONS = (
    *("--served-model-name", MODEL, "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN)),
    *("--enforce-eager", "--kv-cache-memory-bytes", str(1 << 28), "--block-size", "32", "--max-num-seqs", "64"),
    *("--disable-uvicorn-access-log", "--return-tokens-as-token-ids"),
)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# They name one answer, or say how fast it came.
OWN_TO_EACH_ANSWER = {"id", "created", "created_at", "completed_at", "system_fingerprint", "metrics"}


TIME_OF_DAY = re.compile(r"\[\d\d:\d\d:\d\d\] ")


@dataclass(frozen=True)
class Server:
    """A server that was started; ready after `wait_until_healthy`."""

    url: str
    log: Path
    process: "subprocess.Popen[bytes]"
    http: httpx.Client
    since: float  # time.monotonic() of its start

    def wait_until_healthy(self, deadline: float) -> None:
        """Wait for /health until `deadline` (of time.monotonic).

        Raises:
            RuntimeError: the server ended, or the time is up; the message has the end of its log.
        """
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(httpx.TransportError):
                if self.http.get("/health", timeout=2).status_code == 200:
                    starts.started("server", time.monotonic() - self.since)
                    return
            time.sleep(0.2)
        state = "took too long to start" if self.process.poll() is None else f"ended with status {self.process.returncode}"
        raise RuntimeError(f"vllm serve {state}; end of {self.log}:\n{self.log_tail()}")

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of the server's output, long ones cut."""
        return "\n".join(line[:400] for line in self.log.read_text(errors="replace").splitlines()[-lines:])

    def post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        """POST a JSON body to the model; the caller judges the status."""
        return self.http.post(path, json={"model": MODEL, **body})

    def answer(self, path: str, body: Mapping[str, Any]) -> Any:
        """POST a JSON body that must be answered."""
        response = self.post(path, body)
        assert response.status_code == 200, f"{path} {dict(body)}: {response.status_code} {response.text[:500]}"
        return response.json()

    def stream(self, path: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The events of a streamed answer, which must end with [DONE], once."""
        data = []
        with self.http.stream("POST", path, json={"model": MODEL, **body, "stream": True}) as response:
            assert response.status_code == 200, response.read()[:500]
            data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert data.count("[DONE]") == 1
        assert data.pop() == "[DONE]"
        return [json.loads(each) for each in data]

    def metrics(self) -> dict[str, float]:
        """Prometheus samples of vLLM, summed over labels. Counters end in `_total`."""
        samples: dict[str, float] = {}
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith("vllm:"):
                name, value = line.split("{")[0], float(line.rsplit(" ", 1)[1])
                samples[name] = samples.get(name, 0.0) + value
        return samples


@dataclass(frozen=True)
class Pair:
    """Two servers that must answer alike: vLLM as it is, and with draft trees."""

    plain: Server
    trees: Server

    def post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        """The response of both, an answer or a refusal."""
        expected, found = self.plain.post(path, body), self.trees.post(path, body)
        assert found.status_code == expected.status_code, (expected.text[:500], found.text[:500])
        assert_alike(expected.json(), found.json())
        return found

    def answer(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer of both."""
        response = self.post(path, body)
        assert response.status_code == 200, f"{path} {dict(body)}: {response.status_code} {response.text[:500]}"
        return response.json()


def assert_alike(expected: Any, found: Any, where: str = "") -> None:
    """Two JSON values are equal, but for rounding of logprobs and for what is each answer's own."""
    if isinstance(expected, dict) and isinstance(found, dict):
        assert list(expected) == list(found), where
        for key in expected.keys() - OWN_TO_EACH_ANSWER:
            assert_alike(expected[key], found[key], f"{where}.{key}")
    elif isinstance(expected, list) and isinstance(found, list):
        assert len(expected) == len(found), f"{where}: {expected} {found}"
        for i, (one, other) in enumerate(zip(expected, found, strict=True)):
            assert_alike(one, other, f"{where}[{i}]")
    elif isinstance(expected, float) and isinstance(found, float):
        assert abs(expected - found) < 1e-3, f"{where}: {expected} {found}"
    elif isinstance(expected, str) and isinstance(found, str):
        one, other = (TIME_OF_DAY.sub("", text) for text in (expected, found))  # xgrammar's messages tell when
        assert one == other, f"{where}: {expected!r} {found!r}"
    else:
        assert expected == found, f"{where}: {expected!r} {found!r}"


def at_once(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Call the function on all items at the same time."""
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(function, items))


@contextmanager
def started(log: Path, *options: str, model: Path = TARGET, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Start a server without waiting for it; at the end it and everything it started is gone."""
    starts.starts("server")
    port, since = free_port(), time.monotonic()
    # Engines in this process are the tests' habit (conftest.py); a server has its own.
    inherited = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(VLLM), "serve", str(model), "--port", str(port), *OPTIONS, *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=inherited | ENVIRONMENT | dict(environment or {}),
            start_new_session=True,  # a process group of its own
        )
    url = f"http://127.0.0.1:{port}"
    # The server closes a connection that was idle for 5 s; the client lets go of it first, or a request may meet the closing.
    limits = httpx.Limits(max_connections=None, keepalive_expiry=2)
    try:
        with httpx.Client(base_url=url, timeout=120, limits=limits) as http:
            yield Server(url, log, process, http, since)
    finally:
        end(process)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def end(process: "subprocess.Popen[Any]") -> None:
    """Ask the leader of a process group to stop, then kill what is left of the group."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(15)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(15)


@contextmanager
def servers(folder: Path, *options: Sequence[str], seconds: float = 400, model: Path = TARGET) -> Iterator[list[Server]]:
    """Healthy servers, one for each list of options, started side by side; logs in `folder`."""
    with ExitStack() as stack:
        found = [stack.enter_context(started(folder / f"server{i}.log", *each, model=model)) for i, each in enumerate(options)]
        deadline = time.monotonic() + seconds
        for server in found:
            server.wait_until_healthy(deadline)
        yield found


@contextmanager
def serve(folder: Path, *options: str, seconds: float = 400) -> Iterator[Server]:
    """One healthy server."""
    with servers(folder, options, seconds=seconds) as (server,):
        yield server
