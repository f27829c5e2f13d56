"""The same through the helper, which fills the options in and counts.

python examples/02_offline_helper.py [MODEL HEAD]
"""

import sys

from vllm import SamplingParams

import vllm_eagle
from vllm_eagle.pair import HEAD, TARGET


def main() -> None:
    model, head = sys.argv[1:3] if len(sys.argv) > 2 else (TARGET, HEAD)
    llm = vllm_eagle.LLM(
        model,
        head=head,
        num_draft_tokens=16,
        tree={"budget": False},  # draft always: for a model as small as the shipped one trees do not pay
        max_model_len=1024,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 28,
    )
    question = "A baker makes 24 rolls an hour. How many rolls does she make in 5 hours?"
    output = llm.chat([{"role": "user", "content": question}], SamplingParams(temperature=0, max_tokens=120))[0]
    print("Q:", question)
    print("A:", output.outputs[0].text.strip())
    stats = llm.tree_stats()
    print(f"{stats['tau']:.2f} tokens per target pass; accepted per depth: {stats['accepted_at_depth']}")


if __name__ == "__main__":  # vLLM starts processes of its own
    main()
