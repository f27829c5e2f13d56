"""Serve with draft trees through Ray Serve: its own LLM application, several replicas behind one OpenAI address.

    python examples/10_ray_serve.py [REPLICAS [PORT]]

Joins the cluster that RAY_ADDRESS names (PORT is then that of its Serve, if that runs), or starts one on this machine; Ctrl-C ends
the application. Then, as with any OpenAI server:

    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"model": "demo", "prompt": "She makes 24 rolls an hour, so", "max_tokens": 20, "temperature": 0}'
"""

import os
import sys

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

from vllm_eagle.pair import HEAD, TARGET

PER_ENGINE = {"CPU": 1.0}  # of what the cluster has


def application(replicas: int, per_engine: dict[str, float]) -> serve.Application:
    """Routes, and so many engines."""
    config = LLMConfig(
        model_loading_config={"model_id": "demo", "model_source": str(TARGET)},  # as HEAD: a folder that every node has
        engine_kwargs={
            "spec_model": str(HEAD),
            "spec_tokens": 16,
            "additional_config": {"vllm_eagle": {"budget": False}},  # the shipped model is so small that trees never pay
            **{"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "kv_cache_memory_bytes": 1 << 28},
        },
        placement_group_config={"bundles": [per_engine]},
        deployment_config={"num_replicas": replicas},
    )
    return build_openai_app({"llm_configs": [config]})


def main(replicas: str = "1", port: str = "8000") -> None:
    """Serve until Ctrl-C."""
    # Ray counts a CPU for the routes and one for each replica, besides the engines'; that is more than a small machine has.
    ray.init(num_cpus=None if "RAY_ADDRESS" in os.environ else 1 + 2 * int(replicas))
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    try:
        serve.run(application(int(replicas), PER_ENGINE), blocking=True)
    finally:
        serve.delete("default")


if __name__ == "__main__":
    main(*sys.argv[1:])
