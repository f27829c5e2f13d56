"""Draft trees on a Ray cluster of two nodes: Ray Data and Ray Serve answer as plain vLLM does, also when a node is lost."""

import importlib.util
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from tests.engines import engine, generate, tokens
from tests.server import ENVIRONMENT, free_port
from vllm_eagle.pair import TARGET

ray = pytest.importorskip("ray")
from ray import serve  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from vllm import SamplingParams  # noqa: E402

ROOT = Path(__file__).parents[1]
NUM_QUESTIONS = 24


def example(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def chats() -> list[list[dict[str, str]]]:
    lines = (ROOT / "vllm_eagle" / "prompts" / "gsm8k.jsonl").read_text().splitlines()
    return [json.loads(line)["messages"] for line in lines[:NUM_QUESTIONS]]


@pytest.fixture(scope="module")
def expected(chats: list[list[dict[str, str]]]) -> list[list[int]]:
    """What plain vLLM says, in this process, without Ray."""
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=128) for i in range(len(chats))]
    with engine(TARGET, max_model_len=1024) as llm:
        tokenizer = llm.get_tokenizer()
        prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
        return [answer for [answer] in tokens(generate(llm, prompts, params))]


@pytest.fixture
def cluster(expected: Any) -> Iterator[Cluster]:
    """Two nodes, each with room for one engine."""
    environment = {"env_vars": ENVIRONMENT | {"RAY_DATA_DISABLE_PROGRESS_BARS": "1"}}
    node = {"num_cpus": 4, "resources": {"engine": 1}, "object_store_memory": 256 << 20, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args=node)
    try:
        node.pop("include_dashboard")
        started.second = started.add_node(**node)
        ray.init(address=started.address, runtime_env=environment, log_to_driver=False)
        yield started
    finally:
        serve.shutdown()
        ray.shutdown()
        started.shutdown()


@pytest.mark.parametrize("lost", [False, True])
def test_batches_are_answered_as_by_plain_vllm(
    lost: bool, cluster: Cluster, chats: list[list[dict[str, str]]], expected: list[list[int]], tmp_path: Path
) -> None:
    """`lost`: one of the two nodes, as soon as there are answers."""
    batch = example("09_ray_batch")
    questions = ray.data.from_items([{"id": i, "messages": chat} for i, chat in enumerate(chats)], override_num_blocks=NUM_QUESTIONS)

    def noted(row: dict[str, Any]) -> dict[str, Any]:
        (tmp_path / str(row["id"])).touch()
        return row

    answers = batch.answered(questions, 2, {"CPU": 1.0, "engine": 1.0}, batch.ENGINE).map(noted)
    if lost:

        def lose() -> None:
            while not any(tmp_path.iterdir()):
                time.sleep(0.1)
            cluster.remove_node(cluster.second, allow_graceful=False)

        threading.Thread(target=lose, daemon=True).start()
    found = {row["id"]: list(row["token_ids"]) for row in answers.take_all()}
    assert found == dict(enumerate(expected))
    assert len(ray.nodes()) - sum(node["Alive"] for node in ray.nodes()) == lost


def test_serve_answers_as_plain_vllm(cluster: Cluster, chats: list[list[dict[str, str]]], expected: list[list[int]]) -> None:
    """Two replicas, one on each node, behind one address."""
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(example("10_ray_serve").application(2, {"CPU": 1, "engine": 1}))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
        for i, (chat, token_ids) in enumerate(zip(chats, expected, strict=True)):
            body = {"messages": chat, "temperature": i % 2, "seed": i, "max_tokens": 128, "return_token_ids": True}
            response = http.post("/v1/chat/completions", json={"model": "demo", **body})
            assert response.status_code == 200, response.text
            assert response.json()["choices"][0]["token_ids"] == token_ids
