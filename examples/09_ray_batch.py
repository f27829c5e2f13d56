"""Answer many questions offline on a Ray cluster: Ray Data's own vLLM processor, with draft trees in every engine.

    python examples/09_ray_batch.py [QUESTIONS] [OUT] [ENGINES]

QUESTIONS is JSONL with `messages` (by default 16 built-in ones), OUT a folder for answers, ENGINES how many engines share the work.
Joins the cluster that RAY_ADDRESS names, or starts one on this machine. The seed of a row is its number, so answers do not depend
on how many engines there are or which of them answers; a row whose engine dies is answered by another one. Two minutes, two cores.
"""

import sys
from pathlib import Path
from typing import Any

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

import vllm_eagle
from vllm_eagle.pair import HEAD, TARGET

BUILT_IN = Path(vllm_eagle.__file__).parent / "prompts" / "gsm8k.jsonl"
ENGINE = {
    "spec_model": str(HEAD),  # as TARGET: a folder that every node has
    "spec_tokens": 16,
    "additional_config": {"vllm_eagle": {"budget": False}},  # the shipped model is so small that trees never pay
    **{"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "kv_cache_memory_bytes": 1 << 28},
}


def answered(questions: ray.data.Dataset, engines: int, resources: dict[str, float], engine: dict[str, Any]) -> ray.data.Dataset:
    """Rows `id`, `answer` and `token_ids` for rows `id` and `messages`, by so many engines, each with such resources."""

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        sampling = {"temperature": float(row["id"] % 2), "seed": int(row["id"]), "max_tokens": 128}
        return {"id": row["id"], "messages": row["messages"], "sampling_params": sampling}

    def keep(row: dict[str, Any]) -> dict[str, Any]:
        return {"id": row["id"], "answer": row["generated_text"], "token_ids": row["generated_tokens"]}

    config = vLLMEngineProcessorConfig(
        model_source=str(TARGET),
        engine_kwargs=engine,
        placement_group_config={"bundle_per_worker": resources},
        concurrency=(engines, engines),
        batch_size=8,
    )
    answers: ray.data.Dataset = build_processor(config, preprocess=ask, postprocess=keep)(questions)
    return answers


def main(questions: str = "", out: str = "", engines: str = "1") -> None:
    """Answer, print the first answers and write all of them."""
    ray.init(ignore_reinit_error=True)
    rows = ray.data.read_json(questions or str(BUILT_IN), lines=True).take_all()[: None if questions else 16]
    numbered = ray.data.from_items([{"id": i, "messages": row["messages"]} for i, row in enumerate(rows)])
    resources = {"CPU": 1.0}  # on GPUs: {"GPU": 1.0}
    answers = answered(numbered, int(engines), resources, ENGINE).materialize()
    for row in sorted(answers.take_all(), key=lambda row: row["id"])[:3]:
        print(f"--- {row['id']}: {len(row['token_ids'])} tokens\n{row['answer']}")
    if out:
        answers.write_json(out)
    print(f"{answers.count()} answers")


if __name__ == "__main__":
    main(*sys.argv[1:])
