"""Let the target write the answers itself: the head then learns the text that it will draft.

    python -m vllm_eagle.train.regenerate --target MODEL --data FILE --out FILE [--temperature 0 0.7 1]

Rows with `messages` keep their first message and get an answer of the target's; other rows are left out. Several temperatures
take turns, row by row.
"""

import argparse
import json
from pathlib import Path

from vllm_eagle.bench.offline import engine, prepare_environment
from vllm_eagle.train.data import read_rows


def regenerate(args: argparse.Namespace) -> int:
    """Write the dialogues; returns their number."""
    prepare_environment()
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(args.target)
    questions = [row["messages"][:1] for row in read_rows(args.data) if "messages" in row][: args.limit]
    texts = [tokenizer.apply_chat_template(q, tokenize=False, add_generation_prompt=True) for q in questions]
    prompts = [{"prompt_token_ids": ids} for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    # No seed per request: vLLM 0.32 on CPU fails when the prompt of a seeded request is split over two steps.
    params = [
        SamplingParams(temperature=args.temperature[i % len(args.temperature)], max_tokens=args.max_tokens)
        for i in range(len(prompts))
    ]
    settings = {"dtype": "bfloat16", "max_model_len": args.max_model_len, "kv_cache_memory_bytes": 1 << 30, "max_num_seqs": 128}
    kept = [i for i, p in enumerate(prompts) if len(p["prompt_token_ids"]) + args.max_tokens < args.max_model_len]
    with engine(str(args.target), enforce_eager=True, **settings) as llm:
        outputs = llm.generate([prompts[i] for i in kept], [params[i] for i in kept])
    with args.out.open("w", encoding="utf-8") as out:
        for i, output in zip(kept, outputs, strict=True):
            answer = {"role": "assistant", "content": output.outputs[0].text}
            out.write(json.dumps({"messages": [*questions[i], answer]}) + "\n")
    return len(kept)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="JSONL with messages")
    parser.add_argument("--out", type=Path, required=True, help="JSONL to write")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--limit", type=int)
    print(f"{regenerate(parser.parse_args())} dialogues")


if __name__ == "__main__":
    main()
