"""The requests of a soak test: a fixed pool in which every kind of request occurs, and requests that must be refused.

Prompts are made of the built-in questions by the server's own tokenizer, so that lengths are known and prefixes are shared.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MOST_TOKENS = 200
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["name", "age", "ok"],
}


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of the pool."""

    number: int
    kind: str
    path: str
    body: Mapping[str, Any]

    @property
    def comparable(self) -> bool:
        """Whether the answer is the same each time."""
        return self.body["temperature"] == 0 or "seed" in self.body

    @property
    def streams(self) -> bool:
        """vLLM refuses to stream an answer with prompt logprobs."""
        return "prompt_logprobs" not in self.body


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that must be refused with `status`."""

    name: str
    body: Mapping[str, Any]
    status: int = 400


# What is added to a request by kind. Temperature and seed of the other kinds: greedy and seeded in turn.
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.0},
    "unseeded": {"temperature": 1.0, "seed": None},
    "top_k_top_p": {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": 0.3},
    "logit_bias": {"logit_bias": {"224": -4.0, "300": 3.0}},
    "bad_words": {"bad_words": ["the", "is"]},
    "allowed_tokens": {"allowed_token_ids": list(range(400))},
    "min_tokens": {"min_tokens": 20, "stop_token_ids": [224]},
    "ignore_eos": {"ignore_eos": True},
    "logprobs": {"logprobs": 3},
    "prompt_logprobs": {"prompt_logprobs": 1},
    "n": {"temperature": 0.8, "n": 2},
    "stop": {"stop": [".\n", "is 1"]},
    "stop_included": {"stop": [" the", "$"], "include_stop_str_in_output": True},
    "repetition": {"repetition_detection": {"max_pattern_size": 4, "min_count": 3}},
    "json": {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}},
    "regex": {"structured_outputs": {"regex": r"\d{1,3} (apples|pears) and (\d+) more"}},
    "choice": {"structured_outputs": {"choice": ["yes it is", "yes it was", "no"]}},
    "no_tree": {"vllm_xargs": {"eagle_num_draft_tokens": 0}},
    "small_tree": {"vllm_xargs": {"eagle_num_draft_tokens": 4}},
    "chain": {"vllm_xargs": {"eagle_topk": 1}},
}
CHAT_KINDS = ("greedy", "seeded", "json", "choice", "stop", "top_k_top_p")


class Prompts:
    """Prompts of all lengths out of tokenised questions."""

    def __init__(self, questions: Sequence[list[int]], max_model_len: int, draw: random.Random):
        self._questions = questions
        self._max_model_len = max_model_len
        self._draw = draw
        self._shared = self._text(max_model_len // 2)

    def draw(self) -> list[int]:
        """A prompt: half of them a question, the rest tiny, long, near the model's length, or with a shared beginning."""
        question = self._draw.choice(self._questions)
        shapes: list[Callable[[], list[int]]] = [
            lambda: question[: self._draw.randint(1, 4)],
            lambda: self._text(self._draw.randint(self._max_model_len // 2, self._max_model_len * 7 // 8)),
            lambda: self._text(self._max_model_len - self._draw.choice([1, 2, 3, 9, 17, 18, 40])),
            lambda: [*self._shared[: self._draw.choice([96, 160, len(self._shared)])], *question][: self._max_model_len - 20],
        ]
        shape = self._draw.randrange(2 * len(shapes))
        return shapes[shape]() if shape < len(shapes) else question

    def _text(self, length: int) -> list[int]:
        """Questions one after the other, `length` tokens."""
        found: list[int] = []
        while len(found) < length:
            found += self._draw.choice(self._questions)
        return found[:length]


def pool(
    model: str,
    questions: Sequence[list[int]],  # token ids
    chats: Sequence[list[dict[str, str]]],  # the same questions as messages
    max_model_len: int,
    size: int,
    seed: int,
) -> list[Ask]:
    """`size` requests, every kind in turn. The same arguments give the same requests."""
    draw = random.Random(seed)
    prompts = Prompts(questions, max_model_len, draw)
    asks = []
    for number in range(size):
        kind = list(KINDS)[number % len(KINDS)]
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": draw.choice([1, 2, 3, 8, 20, 40, 80, 120, MOST_TOKENS]),
            "temperature": draw.choice([0, 0.7, 1.0]),
            "seed": number,
            "return_token_ids": True,
        } | KINDS[kind]
        if body["seed"] is None:
            del body["seed"]
        body["max_tokens"] = max(body["max_tokens"], body.get("min_tokens", 1))
        in_chat = kind in CHAT_KINDS and draw.random() < 0.5
        if in_chat:
            body["messages"] = draw.choice(chats)
        else:
            # vLLM refuses min_tokens where the prompt leaves no room for them.
            body["prompt"] = prompts.draw()[: max_model_len - body.get("min_tokens", 0) - 1]
        if "logprobs" in body and in_chat:
            raise AssertionError("chats name their logprobs otherwise")
        asks.append(Ask(number, kind, CHAT if in_chat else COMPLETIONS, body))
    return asks


def refused(model: str, max_model_len: int, num_draft_tokens: int) -> list[Refused]:
    """What a server must refuse, whatever else it is doing."""
    good: dict[str, Any] = {"model": model, "prompt": [5, 6, 7], "max_tokens": 4}
    bodies: dict[str, dict[str, Any]] = {
        "prompt too long": {"prompt": [5] * (max_model_len + 1)},
        "prompt as long as the model": {"prompt": [5] * max_model_len},
        "negative token id": {"prompt": [5, -1, 6]},
        "token id beyond the vocabulary": {"prompt": [5, 2**31]},
        "huge token id": {"prompt": [5, 2**70]},
        "no prompt": {"prompt": []},
        "empty prompt": {"prompt": [[]]},
        "empty text": {"prompt": ""},
        "max_tokens": {"max_tokens": 0},
        "temperature": {"temperature": -1},
        "top_p": {"top_p": 2},
        "top_k": {"top_k": -5},
        "min_p": {"min_p": 3},
        "n": {"n": 0},
        "logprobs": {"logprobs": 10**6},
        "logit_bias": {"logit_bias": {str(2**30): 1}},
        "allowed_token_ids": {"allowed_token_ids": [2**30]},
        "regex": {"structured_outputs": {"regex": "(["}},
        "schema": {"structured_outputs": {"json": {"type": "nothing"}}},
        "eagle option out of range": {"vllm_xargs": {"eagle_num_draft_tokens": num_draft_tokens + 1}},
        "unknown eagle option": {"vllm_xargs": {"eagle_nodes": 3}},
    }
    found = [Refused(name, good | change) for name, change in bodies.items()]
    return [*found, Refused("unknown model", good | {"model": "there-is-no-such-model"}, 404)]
