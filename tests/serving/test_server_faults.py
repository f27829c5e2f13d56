"""A real server, broken on purpose: what cannot work ends with its reason, what dies is noticed, what fails costs no answer."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from vllm import SamplingParams

from tests.engine.engines import engine, generate
from tests.serving.server import MAX_MODEL_LEN, MODEL, TREES, Server, at_once, servers, started
from tests.serving.serving_requests import COMPLETIONS
from tests.tiers import exhaustive
from vllm_eagle.pair import HEAD, TARGET

pytestmark = exhaustive  # in the default tier test_faults.py breaks engines, in this process
START_S, END_S = 240, 120  # on a busy machine; idle, a start takes 15 s and an end 2 s
LONG = MAX_MODEL_LEN - 40


# ---- what cannot start


def trees_with(head: Path) -> tuple[str, ...]:
    return ("--speculative-model", str(head), *TREES[2:])


def truncated(head: Path) -> None:
    weights = head / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def missing(head: Path) -> None:
    shutil.rmtree(head)


def broken_config(head: Path) -> None:
    (head / "config.json").write_text('{"model_type": "llama", ')


def other_vocabulary(head: Path) -> None:
    config = json.loads((head / "config.json").read_text())
    (head / "config.json").write_text(json.dumps(config | {"vocab_size": 5000}))


BROKEN_HEADS: list[tuple[Callable[[Path], None], str]] = [
    (truncated, "{head}/model.safetensors: no readable safetensors file"),
    (missing, "speculative model {head}: no such folder; set spec_model"),
    (broken_config, "speculative model {head}/config.json: no JSON"),
    (other_vocabulary, "speculative model {head}: its vocabulary has 5000 tokens, the target's 4096"),
]


def test_a_broken_head_ends_the_server_with_its_reason(tmp_path: Path) -> None:
    """The last line of the output says what is wrong; nobody has to read the traceback above it."""

    def last_line(case: tuple[Callable[[Path], None], str]) -> tuple[int, str]:
        head = tmp_path / case[0].__name__
        shutil.copytree(HEAD, head)
        case[0](head)
        with started(tmp_path / f"{head.name}.log", *trees_with(head)) as server:
            status = server.process.wait(START_S)
            return status, server.log.read_text().splitlines()[-1]

    for (breakage, message), (status, line) in zip(BROKEN_HEADS, at_once(last_line, BROKEN_HEADS), strict=True):
        assert status not in (0, None), breakage
        assert message.format(head=tmp_path / breakage.__name__, target=TARGET) in line


def test_a_cache_that_cannot_hold_one_request_is_refused(tmp_path: Path) -> None:
    """By vLLM itself, which knows how much one request needs, trees included."""
    with started(tmp_path / "log", *TREES, "--kv-cache-memory-bytes", str(1 << 20)) as server:
        assert server.process.wait(START_S) != 0
        log = server.log.read_text()
    assert "larger than the available KV cache memory" in log
    assert "kv_cache_memory_bytes" in log or "max_model_len" in log


# ---- what dies


def family(server: Server) -> dict[str, psutil.Process]:
    """The server's processes by role."""
    first = psutil.Process(server.process.pid)
    roles = {"APIServer": first}
    for child in first.children(recursive=True):
        roles[child.cmdline()[0].removeprefix("VLLM::")] = child
    return roles


def counters(worker: psutil.Process) -> list[Path]:
    """The files of counters that a worker has mapped."""
    return [Path(area.path) for area in worker.memory_maps() if "vllm_eagle-" in area.path]


def wait_until(happens: Callable[[], bool], seconds: float = END_S) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if happens():
            return True
        time.sleep(0.1)
    return False


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Streams:
    """Long streamed requests, and how each of them ended."""

    def __init__(self, server: Server, number: int, patience_s: float = END_S):
        self._server = server
        self._patience_s = patience_s  # without a word of the server
        self._begun = [threading.Semaphore(0) for _ in range(number)]
        self.ends: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(number)]
        for thread in self._threads:
            thread.start()
        # All are decoding.
        for begun in self._begun:
            assert begun.acquire(timeout=START_S), "a stream does not begin"

    def _run(self, i: int) -> None:
        body = {"model": MODEL, "prompt": [5 + i, 6, 7], "max_tokens": LONG, "ignore_eos": True, "stream": True}
        end = "cut off"
        try:
            with httpx.stream("POST", f"{self._server.url}/v1/completions", json=body, timeout=self._patience_s) as response:
                for line in response.iter_lines():
                    if '"finish_reason":"length"' in line:
                        end = "complete"
                    elif line.startswith('data: {"error"') or '"finish_reason":"abort"' in line:
                        end = "error"
                    if line:
                        self._begun[i].release()
        except httpx.TimeoutException:
            end = "hung"
        except httpx.TransportError:
            end = "cut off"
        self.ends.append(end)

    def wait(self) -> list[str]:
        for thread in self._threads:
            thread.join(END_S)
        assert len(self.ends) == len(self._threads), "a client hangs"
        return sorted(self.ends)


def after_a_kill(server: Server, role: str) -> dict[str, Any]:
    """Kill a process of the server while requests stream; what clients and operators see of it."""
    roles = family(server)
    files = counters(roles["Worker"])
    # The engine is ahead of its clients; so many it cannot be done with before the last of them has begun.
    streams = Streams(server, 24)
    roles[role].kill()
    ends = set(streams.wait())
    status = server.process.wait(END_S)
    gone = wait_until(lambda: all(map(is_gone, roles.values())))
    return {
        "ends": sorted(ends),
        "status": status,
        "gone": gone,
        "files": [path for path in files if path.exists()],
        "had files": bool(files),
    }


@pytest.mark.parametrize("role", ["Worker", "EngineCore"])
def test_a_killed_process_ends_the_server_as_it_does_without_trees(role: str, tmp_path: Path) -> None:
    with servers(tmp_path, [], TREES, seconds=START_S) as (plain, trees):
        expected, found = at_once(lambda server: after_a_kill(server, role), [plain, trees])
    assert found.pop("had files")
    assert not expected.pop("had files")
    # How a stream ends, with an error or cut off, is a matter of milliseconds. The engine may even be done with some.
    for seen in (expected, found):
        ends = set(seen.pop("ends"))
        assert "hung" not in ends
        assert ends & {"error", "cut off"}
    assert found == expected
    assert found["gone"]
    assert found["files"] == []


def after_sigterm(server: Server) -> dict[str, Any]:
    """Ask a server to stop, as service managers do, while requests stream.

    vLLM kills its engine at once then, without trees as well. Whether that still tells the clients is a matter of milliseconds; if
    not, vLLM waits until they give up.
    """
    roles = family(server)
    files = counters(roles["Worker"])
    streams = Streams(server, 24, patience_s=10)
    server.process.terminate()
    ends = streams.wait()
    status = server.process.wait(END_S)
    gone = wait_until(lambda: all(map(is_gone, roles.values())))
    return {"all complete": set(ends) == {"complete"}, "status": status, "gone": gone, "files": [x for x in files if x.exists()]}


def test_a_server_that_is_terminated_while_it_streams_ends_as_it_does_without_trees(tmp_path: Path) -> None:
    with servers(tmp_path, [], TREES, seconds=START_S) as (plain, trees):
        expected, found = at_once(after_sigterm, [plain, trees])
    assert found == expected == {"all complete": False, "status": 0, "gone": True, "files": []}


# ---- what goes on

PROMPTS = [[*range(10 * i + 5, 10 * i + 25 + 9 * i)] for i in range(12)]
BODIES: list[dict[str, Any]] = [
    {"prompt": prompt, "max_tokens": [60, 9, 120][i % 3], "temperature": [0.0, 1.0][i % 2], "seed": i, "ignore_eos": True}
    for i, prompt in enumerate(PROMPTS)
]
# As long as the model, from the start or at the end.
BODIES += [
    {"prompt": [*range(5, 5 + MAX_MODEL_LEN - 1)], "max_tokens": 1, "temperature": 0.0, "seed": 0},
    {"prompt": [*range(9, 9 + LONG)], "max_tokens": MAX_MODEL_LEN - LONG, "temperature": 1.0, "seed": 1, "ignore_eos": True},
]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """Plain vLLM's answers to BODIES."""
    params = [SamplingParams(**{name: value for name, value in body.items() if name != "prompt"}) for body in BODIES]
    # Prompts in one piece: plain vLLM on CPU cannot split those of seeded requests.
    with engine(TARGET, max_num_batched_tokens=4096) as llm:
        return [list(output.outputs[0].token_ids) for output in generate(llm, [body["prompt"] for body in BODIES], params)]


def answers(server: Server) -> list[list[int]]:
    """What the server says to BODIES, all asked at once."""

    def ask(body: dict[str, Any]) -> list[int]:
        found: list[int] = server.answer(COMPLETIONS, {"return_token_ids": True} | body)["choices"][0]["token_ids"]
        return found

    return at_once(ask, BODIES)


PLUGIN = """
from vllm_eagle.engine.v1.proposer import EagleTreeProposer

def register():
    propose, calls = EagleTreeProposer.propose, []
    if propose.__name__ == "fails_once":
        return
    def fails_once(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 20:
            raise RuntimeError("injected")
        return propose(self, *args, **kwargs)
    EagleTreeProposer.propose = fails_once
"""


def test_a_failure_in_drafting_costs_no_answer(expected: list[list[int]], tmp_path: Path) -> None:
    """Injected by another plugin. So few tokens fit into a step that some requests wait for the next one with their trees.

    Metrics go through files, as where several servers are scraped as one.
    """
    plugins = tmp_path / "plugins"
    (plugins / "failing-1.dist-info").mkdir(parents=True)
    (plugins / "failing-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: failing\nVersion: 1\n")
    (plugins / "failing-1.dist-info" / "entry_points.txt").write_text("[vllm.general_plugins]\nfailing = failing:register\n")
    (plugins / "failing.py").write_text(PLUGIN)
    options = (*TREES, "--max-num-batched-tokens", "72", "--max-num-seqs", "16")
    (tmp_path / "metrics").mkdir()
    environment = {"PYTHONPATH": str(plugins), "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics")}
    with started(tmp_path / "log", *options, environment=environment) as server:
        server.wait_until_healthy(time.monotonic() + START_S)
        assert answers(server) == expected
        assert answers(server) == expected
        assert wait_until(lambda: tree_metrics(server).get("vllm_eagle_speculation_off") == 1)
        samples = tree_metrics(server)
        log = server.log.read_text()
    assert log.count("Drafting failed") == 1
    assert log.count("RuntimeError: injected") == 1
    assert samples["vllm_eagle_drafting_errors_total"] == 1
    assert samples["vllm_eagle_nodes_accepted_total"] > 0  # before it failed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose cache holds one request of the model's length, and no block more: 16 of 32 tokens, and vLLM's null block."""
    # Without a timeout vLLM stops its engine at once at SIGTERM, and then waits for clients that get nothing any more.
    options = [*TREES, "--num-gpu-blocks-override", "17", "--shutdown-timeout", str(END_S)]
    with servers(tmp_path_factory.mktemp("tiny"), options, seconds=START_S) as (server,):
        yield server


def test_a_cache_for_one_request_and_its_tree_serves_many(expected: list[list[int]], tiny: Server) -> None:
    assert answers(tiny) == expected
    assert tiny.metrics()["vllm:num_preemptions_total"] > 0
    assert tree_metrics(tiny)["vllm_eagle_nodes_accepted_total"] > 0


GARBAGE: list[Any] = [
    *([5] * (MAX_MODEL_LEN + 1), [5, -1], [5, 4096], [5, 1 << 31], [5, 1 << 70]),
    *([], [[]], "", [5, None], {"token": 5}),
]


def test_garbage_is_refused_while_others_go_on(tiny: Server) -> None:
    streams = Streams(tiny, 2)
    responses = [tiny.post(COMPLETIONS, {"prompt": prompt, "max_tokens": 4}) for prompt in GARBAGE]
    assert [response.status_code for response in responses] == [400] * len(GARBAGE)
    assert all(response.json()["error"]["message"] for response in responses)
    assert streams.wait() == ["complete"] * 2


def test_a_terminated_server_answers_and_leaves_nothing_behind(tiny: Server) -> None:
    """The last test that uses this server."""
    roles = family(tiny)
    files = counters(roles["Worker"])
    assert len(files) == 1
    streams = Streams(tiny, 2)
    tiny.process.terminate()
    assert tiny.process.wait(END_S) == 0
    assert streams.wait() == ["complete"] * 2
    assert wait_until(lambda: all(map(is_gone, roles.values())))
    assert not files[0].exists()


def tree_metrics(server: Server) -> dict[str, float]:
    lines = [line for line in server.http.get("/metrics").text.splitlines() if line.startswith("vllm_eagle_")]
    return {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
