"""Batch generation through vLLM's own LLM class: draft trees are three options.

python examples/01_offline_vllm.py [MODEL HEAD]
"""

import sys

from vllm import LLM, SamplingParams

from vllm_eagle.pair import HEAD, TARGET

QUESTIONS = [
    "A box holds 12 pencils. Tom buys 4 boxes and gives away 9 pencils. How many pencils does he have left?",
    "Sara reads 15 pages a day. How many pages does she read in 3 weeks?",
]


def main() -> None:
    model, head = sys.argv[1:3] if len(sys.argv) > 2 else (str(TARGET), str(HEAD))
    llm = LLM(
        model,
        max_model_len=1024,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 28,
        spec_model=head,  # an EAGLE-1, EAGLE-2 or EAGLE-3 head
        spec_tokens=16,  # nodes per tree
        # {} takes the defaults. Without the budget trees are drafted always; for a model as small as this they hardly pay.
        additional_config={"vllm_eagle": {"topk": 8, "max_depth": 8, "budget": False}},
    )
    # Any sampling parameter works, min-p and logit bias too; with a seed, the tokens are those of plain vLLM.
    params = SamplingParams(temperature=0.7, min_p=0.05, seed=1, max_tokens=120)
    outputs = llm.chat([[{"role": "user", "content": question}] for question in QUESTIONS], params)
    for question, output in zip(QUESTIONS, outputs, strict=True):
        print(f"Q: {question}\nA: {output.outputs[0].text.strip()}\n")


if __name__ == "__main__":  # vLLM starts processes of its own
    main()
