"""Answers that must have a form: a pydantic model, a regular expression, one of several choices. Trees obey grammars, too.

KEEP=1 bash examples/04_serve.sh &
python examples/06_structured_output.py [BASE_URL]

The shipped model knows nothing but sums, so expect the form to be right and the content to be nonsense.
"""

import sys
from typing import Any, Literal

from openai import OpenAI
from pydantic import BaseModel, Field


class Item(BaseModel):
    """A kind of goods and how many of it. Bounds keep a small model from going on for ever."""

    kind: Literal["pencil", "box"]
    count: int = Field(ge=0, le=99)


class Purchase(BaseModel):
    """What somebody bought."""

    buyer: str = Field(max_length=12)
    items: list[Item] = Field(min_length=1, max_length=2)


def main() -> None:
    client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="none")
    common: dict[str, Any] = {
        "model": client.models.list().data[0].id,
        "messages": [{"role": "user", "content": "Tom buys 4 boxes of 6 pencils each. What did he buy?"}],
        "temperature": 0,
        "max_tokens": 150,
    }

    purchase = client.chat.completions.parse(**common, response_format=Purchase).choices[0].message.parsed
    print("json_schema:", purchase)

    regex = r"\d{1,3} pencils in \d{1,2} boxes"
    answer = client.chat.completions.create(**common, extra_body={"structured_outputs": {"regex": regex}})
    print("regex:      ", answer.choices[0].message.content)

    choices = ["yes, enough", "no, too few"]
    answer = client.chat.completions.create(**common, extra_body={"structured_outputs": {"choice": choices}})
    print("choice:     ", answer.choices[0].message.content)


if __name__ == "__main__":
    main()
