"""The OpenAI client against `vllm serve` with draft trees: chat, streams, seeds, options of one request.

KEEP=1 bash examples/04_serve.sh &
python examples/05_openai_client.py [BASE_URL]
"""

import sys
from typing import Any

from openai import OpenAI

QUESTION = "A baker makes 24 rolls an hour. How many rolls does she make in 5 hours?"


def main() -> None:
    client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="none")
    model = client.models.list().data[0].id

    def ask(**options: Any) -> str:
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=120, **options
        )
        return answer.choices[0].message.content or ""

    print(f"--- {QUESTION}\n{ask(temperature=0)}")

    print("--- streamed; what one target pass accepted stands between two bars")
    stream = client.completions.create(
        model=model, prompt="She makes 24 rolls an hour, so", temperature=0, max_tokens=40, stream=True
    )
    print("|".join(event.choices[0].text for event in stream))

    # Parameters that OpenAI does not have go into extra_body. min_p and logit_bias work with trees.
    print("--- sampled, with a seed and min_p")
    sampled = ask(temperature=0.8, seed=7, extra_body={"min_p": 0.05})
    print(sampled)

    # Options of one request never change what it gets, only how fast. Limits: those of the server.
    print("--- the same with other trees for this request")
    for options in ({"eagle_num_draft_tokens": 0}, {"eagle_num_draft_tokens": 4}, {"eagle_max_depth": 2}, {"eagle_topk": 1}):
        same = ask(temperature=0.8, seed=7, extra_body={"min_p": 0.05, "vllm_xargs": options})
        print(f"{options}: {'the same answer' if same == sampled else 'ANOTHER ANSWER: ' + same}")


if __name__ == "__main__":
    main()
