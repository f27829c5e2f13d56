"""A made-up engine behind the real page: in an application for tests of routes, or on a port for a browser."""

import asyncio
import random
import threading
import time
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI

from tests.serving.server import free_port
from vllm_eagle.algorithm.accept import Walk
from vllm_eagle.algorithm.tree import DraftTree
from vllm_eagle.metrics import stats_file
from vllm_eagle.metrics.counters import TreeMetrics, TreeTrace
from vllm_eagle.options.devices import CPU
from vllm_eagle.serving.page import EaglePage
from vllm_eagle.serving.stat_logger import EagleStatLogger, Load

WORDS = ["<s>", "The", " price", " of", " four", " boxes", " is", " 48", "\n", " pencils", "<script>alert(1)</script>", " &amp;"]


class Tokenizer:
    """Decodes like one that drops the space in front of a text."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return "".join(WORDS[i % len(WORDS)] for i in ids).removeprefix(" ")


class Engine:
    """What the page may touch of vLLM's AsyncLLM."""

    def __init__(self, tree_mode: bool = True, **options: Any):
        worker = CPU.worker_cls if tree_mode else "vllm.v1.worker.cpu_worker.CPUWorker"
        speculative = SimpleNamespace(
            num_speculative_tokens=16, model="/models/head", target_parallel_config=SimpleNamespace(worker_cls=worker)
        )
        self.vllm_config = SimpleNamespace(
            instance_id=f"test-{time.time_ns()}",
            additional_config={"vllm_eagle": options} if tree_mode else {},
            speculative_config=speculative,
            model_config=SimpleNamespace(served_model_name="shipped-pair"),
            parallel_config=SimpleNamespace(_api_process_count=1, _api_process_rank=-1),
        )
        self.errored = False
        self.calls: list[str] = []
        self.trace = TreeTrace()
        self.metrics = TreeMetrics()
        self.broken = False
        self.answering = asyncio.Event()
        self.answering.set()
        stats = EagleStatLogger.__new__(EagleStatLogger)
        stats.load = Load(running=3, waiting=1, kv_usage=0.25)
        self.logger_manager = SimpleNamespace(stat_loggers=[object(), stats])

    def get_tokenizer(self) -> Tokenizer:
        return Tokenizer()

    async def collective_rpc(self, method: str) -> list[Any]:
        self.calls.append(method)
        await self.answering.wait()
        if self.broken:
            raise RuntimeError("secret detail")
        return [{"eagle_stats": self.metrics.as_dict, "eagle_recent_trees": self.trace.last}[method]()]

    @property
    def file(self) -> Path:
        return stats_file.path_of(self.vllm_config.instance_id)

    def create_file(self) -> None:
        self.metrics = TreeMetrics(stats_file.create(self.file))

    def step(self, tree: DraftTree, emitted: list[int], num_requests: int = 1, req_id: str = "chatcmpl-secret") -> None:
        """Verify one tree."""
        walk = Walk(tree)
        for token in emitted:
            walk.advance(token)
        self.metrics.add("num_passes")
        self.metrics.add("num_drafted", tree.num_nodes - 1)
        self.metrics.count_verification(tree.num_nodes - 1, len(walk.path), num_requests)
        self.metrics.count_decision("tree", num_requests)
        for stage, seconds in (("draft", 0.002), ("verify", 0.005), ("accept", 0.001), ("compact", 0.0002)):
            self.metrics.add_seconds(stage, seconds)  # type: ignore[arg-type]
        self.trace.record(req_id, walk)


def small_tree() -> DraftTree:
    """Root, two children, and a child of the first."""
    scores = np.log(np.array([1, 0.9, 0.1, 0.8], dtype=np.float32))
    return DraftTree(np.array([1, 2, 10, 3]), np.array([0, 0, 0, 1]), scores)


def grown_tree(rng: random.Random, num_nodes: int = 16) -> DraftTree:
    """A tree like those that confidence grows."""
    parents, scores, tokens, used = [0], [0.0], [1], {0: set[int]()}
    while len(parents) <= num_nodes:
        parent = max(range(len(parents)), key=lambda i: scores[i] - 0.7 * len(used[i]) + rng.gauss(0, 0.4))
        token = rng.choice([i for i in range(1, 10) if i not in used[parent]] or [9])
        parents.append(parent)
        scores.append(scores[parent] + np.log(rng.uniform(0.75, 0.98)) - 1.5 * len(used[parent]))
        tokens.append(token)
        used[parent].add(token)
        used[len(parents) - 1] = set()
    return DraftTree(np.array(tokens), np.array(parents), np.array(scores, dtype=np.float32))


def work(engine: Engine, steps: int, seed: int = 0) -> None:
    """Verify trees of several requests as a server under some load does."""
    rng = random.Random(seed)
    for _ in range(steps):
        num_requests = rng.choice((1, 2, 3, 5))
        tree = grown_tree(rng, 16 if num_requests < 4 else 8)
        node, emitted = 0, []
        while children := [i for i in range(1, tree.num_nodes) if tree.parents[i] == node]:
            child = children[0] if rng.random() < 0.82 else children[-1]
            if rng.random() > 0.86:
                break
            emitted.append(int(tree.token_ids[child]))
            node = child
        engine.step(tree, [*emitted, 0], num_requests, f"chatcmpl-{rng.randrange(4)}")


def application(engine: Engine, api_key: list[str] | None = None) -> FastAPI:
    plugin = EaglePage()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await plugin.init_state(engine, app.state, Namespace(api_key=api_key))
        yield

    app = FastAPI(lifespan=lifespan)
    plugin.attach_router(app)
    return app


class Server:
    """The page on a port of this machine; may go away and come back."""

    def __init__(self, engine: Engine, api_key: list[str] | None = None):
        self.engine = engine
        self.port = free_port()
        self.requests: list[str] = []
        self._api_key = api_key
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/eagle"

    def start(self) -> None:
        app = application(self.engine, self._api_key)

        async def noting(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                self.requests.append(scope["path"])
            await app(scope, receive, send)

        self._server = uvicorn.Server(uvicorn.Config(noting, host="127.0.0.1", port=self.port, log_level="error"))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()))
        self._thread.start()
        while not self._server.started:
            time.sleep(0.02)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
