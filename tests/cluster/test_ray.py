"""Draft trees on a Ray cluster of two nodes: Ray Serve and Ray Data answer as plain vLLM does, also when a node is lost."""

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
from vllm import SamplingParams

from tests.engine.engines import engine, generate, tokens
from tests.serving.server import ENVIRONMENT, free_port
from tests.tiers import exhaustive
from vllm_eagle.pair import TARGET

ray = pytest.importorskip("ray")
from ray import serve  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

ROOT = Path(__file__).parents[2]
pytestmark = exhaustive
NUM_QUESTIONS = 24
MAX_TOKENS = 128
PER_ENGINE = {"CPU": 1.0, "engine": 1.0}  # a node has room for one


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
def expected(chats: list[list[dict[str, str]]]) -> dict[str, list[list[int]]]:
    """What plain vLLM says to the prompts that each library makes of the chats, in this process, without Ray."""
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=MAX_TOKENS) for i in range(len(chats))]
    with engine(TARGET, max_model_len=1024) as llm:
        tokenizer = llm.get_tokenizer()
        texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
        # Ray Data puts the start token before a text in which the template has put it already.
        prompts = {"serve": tokenizer(texts, add_special_tokens=False)["input_ids"], "data": tokenizer(texts)["input_ids"]}
        return {library: [answer for [answer] in tokens(generate(llm, ids, params))] for library, ids in prompts.items()}


@pytest.fixture(scope="module")
def cluster(expected: Any) -> Iterator[Cluster]:
    """Two nodes, each with room for one engine."""
    node = {"num_cpus": 4, "resources": {"engine": 1}, "object_store_memory": 256 << 20}
    started = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    try:
        started.add_node(**node)
        ray.init(address=started.address, runtime_env={"env_vars": ENVIRONMENT}, log_to_driver=False)
        yield started
    finally:
        ray.shutdown()
        started.shutdown()


def test_serve_answers_as_plain_vllm(
    cluster: Cluster, chats: list[list[dict[str, str]]], expected: dict[str, list[list[int]]]
) -> None:
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(example("10_ray_serve").application(1, PER_ENGINE))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
            for i, (chat, token_ids) in enumerate(zip(chats, expected["serve"], strict=True)):
                body = {"messages": chat, "temperature": i % 2, "seed": i, "max_tokens": MAX_TOKENS, "return_token_ids": True}
                response = http.post("/v1/chat/completions", json={"model": "demo", **body})
                assert response.status_code == 200, response.text
                assert response.json()["choices"][0]["token_ids"] == token_ids
    finally:
        serve.shutdown()


def test_batches_are_answered_as_by_plain_vllm_though_a_node_is_lost(
    cluster: Cluster, chats: list[list[dict[str, str]]], expected: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """One of two, as soon as there are answers: what it had not answered is answered by the other."""
    batch = example("09_ray_batch")
    questions = ray.data.from_items(
        [{"id": i, "messages": chat} for i, chat in enumerate(chats)], override_num_blocks=NUM_QUESTIONS
    )

    def noted(row: dict[str, Any]) -> dict[str, Any]:
        (tmp_path / str(row["id"])).touch()
        return row

    def lose() -> None:
        while not any(tmp_path.iterdir()):
            time.sleep(0.1)
        cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)

    loses = threading.Thread(target=lose, daemon=True)
    loses.start()
    rows = batch.answered(questions, 2, PER_ENGINE).map(noted).take_all()
    loses.join(60)
    assert {row["id"]: list(row["token_ids"]) for row in rows} == dict(enumerate(expected["data"]))
    for _ in range(600):  # Ray may notice after the last answer
        if (alive := sorted(node["Alive"] for node in ray.nodes())) == [False, True]:
            break
        time.sleep(0.1)
    assert alive == [False, True]
