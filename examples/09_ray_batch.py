"""Answer many questions offline on a Ray cluster: Ray Data's own vLLM processor, with draft trees in every engine.

    python examples/09_ray_batch.py [QUESTIONS [OUT [ENGINES]]]

QUESTIONS is JSONL with `messages` (by default 16 built-in ones), OUT the JSONL for the answers, ENGINES how many engines share the
work. Joins the cluster that RAY_ADDRESS names, or starts one on this machine. The seed of a row is its number, so answers do not
depend on how many engines there are or which of them answers; what an engine has not answered when it dies, another one answers.
Two minutes on two cores.
"""

import json
import os
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
PER_ENGINE = {"CPU": 1.0}  # of what the cluster has; on GPUs {"GPU": 1.0}


def answered(questions: ray.data.Dataset, engines: int, per_engine: dict[str, float]) -> ray.data.Dataset:
    """Rows `id`, `answer` and `token_ids` for rows `id` and `messages`."""

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        sampling = {"temperature": float(row["id"] % 2), "seed": int(row["id"]), "max_tokens": 128}
        return {"id": row["id"], "messages": row["messages"], "sampling_params": sampling}

    def keep(row: dict[str, Any]) -> dict[str, Any]:
        return {"id": row["id"], "answer": row["generated_text"], "token_ids": row["generated_tokens"]}

    light = {"concurrency": 1, "num_cpus": 0.1}  # else each of these stages wants as many CPUs as there are engines
    config = vLLMEngineProcessorConfig(
        model_source=str(TARGET),
        engine_kwargs=ENGINE,
        placement_group_config={"bundle_per_worker": per_engine},
        concurrency=(engines, engines),
        batch_size=8,
        chat_template_stage=light,
        tokenize_stage=light,
        detokenize_stage=light,
    )
    answers: ray.data.Dataset = build_processor(config, preprocess=ask, postprocess=keep)(questions)
    return answers


def main(questions: str = "", out: str = "", engines: str = "1") -> None:
    """Answer, print the first answers and write all of them."""
    lines = Path(questions or BUILT_IN).read_text(encoding="utf-8").splitlines()[: None if questions else 16]
    # Ray counts CPUs for the stages before and after the engines, too; with them it is more than a small machine has.
    ray.init(num_cpus=None if "RAY_ADDRESS" in os.environ else 4 + int(engines))
    numbered = ray.data.from_items([{"id": i, "messages": json.loads(line)["messages"]} for i, line in enumerate(lines)])
    rows = sorted(answered(numbered, int(engines), PER_ENGINE).take_all(), key=lambda row: row["id"])
    for row in rows[:3]:
        print(f"--- {row['id']}: {len(row['token_ids'])} tokens\n{row['answer']}")
    if out:
        Path(out).write_text(
            "".join(json.dumps({"id": row["id"], "answer": row["answer"]}) + "\n" for row in rows), encoding="utf-8"
        )
    print(f"{len(rows)} answers")


if __name__ == "__main__":
    main(*sys.argv[1:])
