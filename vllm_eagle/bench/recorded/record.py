"""Record trees as they are drafted and accepted, for `vllm-eagle simulate`: `python -m vllm_eagle.bench.recorded.record OUT`.

What the head scores and what the target accepts depends on the models and the text, not on the machine.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_eagle.bench.engines.drafters import ours
from vllm_eagle.bench.engines.offline import encode_prompts, engine, generate, prepare_environment
from vllm_eagle.pair import HEAD, TARGET


def record(model: str, head: str, num_nodes: int, max_tokens: int, every: int, prompts: Path | None = None) -> dict[str, Any]:
    """Trees of `num_nodes` nodes, every so many: parents, scores and accepted nodes of each."""
    prepare_environment()
    from vllm import SamplingParams

    encoded = encode_prompts(model, prompts)
    length = max(map(len, encoded)) + max_tokens + 1
    with engine(
        model,
        dtype="float32",
        max_model_len=length,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 28,
        **ours(head, num_nodes, budget=False),
    ) as llm:
        llm.collective_rpc("eagle_trace", args=(1 << 30,))
        generate(llm, encoded, [SamplingParams(temperature=0, max_tokens=max_tokens)] * len(encoded))
        steps = llm.collective_rpc("eagle_traced")[0]
    full = [step for step in steps if len(step["parents"]) == 1 + num_nodes][::every]
    trees = [
        {
            "parents": list(map(int, x["parents"])),
            "scores": [round(float(y), 3) for y in x["scores"]],
            "path": list(map(int, x["path"])),
        }
        for x in full
    ]
    return {"model": Path(model).name, "head": Path(head).name, "temperature": 0, "trees": trees}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=str(TARGET))
    parser.add_argument("--head", default=str(HEAD))
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--num-nodes", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--every", type=int, default=8, help="keep one tree of so many (default %(default)s)")
    args = parser.parse_args()
    found = record(args.model, args.head, args.num_nodes, args.max_tokens, args.every, args.prompts)
    args.out.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    print(f"{len(found['trees'])} trees")


if __name__ == "__main__":
    main()
