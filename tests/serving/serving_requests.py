"""Requests to the OpenAI server that the tests share, with every parameter that shapes an answer."""

import json
from typing import Any

from vllm_eagle.bench.engines.offline import BUILT_IN_PROMPTS

QUESTION = "Tom has 12 pencils and buys 4 boxes of 6 pencils each. How many pencils does he have now?"
MESSAGES = [{"role": "user", "content": QUESTION}]
PROMPT = f"<|user|>\n{QUESTION}</s><|assistant|>\n"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GREEDY: dict[str, Any] = {"prompt": PROMPT, "temperature": 0, "max_tokens": 48, "return_token_ids": True}
SEEDED = GREEDY | {"temperature": 1, "seed": 5}
DIGITS = [*range(19, 29), 224, 1, 17, 16, 14, 278]  # and what stands between them

# Name -> path and body. Those that vLLM refuses stand in test_serve_refusals.py.
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (COMPLETIONS, GREEDY),
    "seeded": (COMPLETIONS, SEEDED),
    "another seed": (COMPLETIONS, SEEDED | {"seed": -7}),
    "default length": (COMPLETIONS, {"prompt": PROMPT, "temperature": 0}),
    "n": (COMPLETIONS, SEEDED | {"n": 3}),
    "several prompts": (COMPLETIONS, GREEDY | {"prompt": [PROMPT, "Once upon a time", PROMPT]}),
    "token ids": (COMPLETIONS, SEEDED | {"prompt": [[5, 6, 7, 8], [9, 10]]}),
    "one token": (COMPLETIONS, GREEDY | {"prompt": [9]}),
    "cut prompt": (COMPLETIONS, SEEDED | {"truncate_prompt_tokens": 10}),
    "best_of, which vLLM ignores": (COMPLETIONS, GREEDY | {"best_of": 2}),
    "low temperature": (COMPLETIONS, SEEDED | {"temperature": 0.3}),
    "high temperature": (COMPLETIONS, SEEDED | {"temperature": 2.0}),
    "top_k": (COMPLETIONS, SEEDED | {"top_k": 5, "temperature": 1.5}),
    "top_p": (COMPLETIONS, SEEDED | {"top_p": 0.7}),
    # vLLM refuses these two under speculation.
    "min_p": (COMPLETIONS, SEEDED | {"min_p": 0.2, "temperature": 1.5}),
    "logit_bias": (COMPLETIONS, SEEDED | {"logit_bias": {"20": 5.0, "30": -100}}),
    "presence_penalty": (COMPLETIONS, SEEDED | {"presence_penalty": 1.5}),
    "frequency_penalty": (COMPLETIONS, SEEDED | {"frequency_penalty": 1.2}),
    "repetition_penalty": (COMPLETIONS, GREEDY | {"repetition_penalty": 1.3}),
    "all penalties and top_k, top_p, min_p": (
        COMPLETIONS,
        SEEDED
        | {"presence_penalty": 0.5, "frequency_penalty": -0.3, "repetition_penalty": 1.1, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
    ),
    "bad_words": (COMPLETIONS, GREEDY | {"bad_words": ["12", "has 6"]}),
    "allowed_token_ids": (COMPLETIONS, SEEDED | {"allowed_token_ids": DIGITS}),
    "repetition_detection": (
        COMPLETIONS,
        GREEDY | {"ignore_eos": True, "max_tokens": 150, "repetition_detection": {"max_pattern_size": 3, "min_count": 3}},
    ),
    "echo": (COMPLETIONS, {"prompt": PROMPT, "temperature": 0, "echo": True}),
    "special tokens shown": (COMPLETIONS, GREEDY | {"max_tokens": 100, "skip_special_tokens": False}),
    "beam search": (COMPLETIONS, GREEDY | {"use_beam_search": True, "n": 3, "max_tokens": 24}),
    "chat": (CHAT, {"messages": MESSAGES, "temperature": 0, "return_token_ids": True}),
    "chat, seeded": (CHAT, {"messages": MESSAGES, "seed": 4, "max_tokens": 60, "return_token_ids": True}),
    "chat, n": (CHAT, {"messages": MESSAGES, "seed": 1, "n": 2, "max_completion_tokens": 40}),
    "chat, several turns": (
        CHAT,
        {"messages": [*MESSAGES, {"role": "assistant", "content": "He has 36."}, *MESSAGES], "temperature": 0, "max_tokens": 40},
    ),
    "chat, goes on with an answer": (
        CHAT,
        {
            "messages": [*MESSAGES, {"role": "assistant", "content": "Tom has"}],
            "continue_final_message": True,
            "add_generation_prompt": False,
            "temperature": 0,
        },
    ),
    "chat, beam search": (CHAT, {"messages": MESSAGES, "temperature": 0, "use_beam_search": True, "n": 2, "max_tokens": 24}),
    "responses": ("/v1/responses", {"input": QUESTION, "temperature": 0, "max_output_tokens": 40}),
    "messages": ("/v1/messages", {"messages": MESSAGES, "temperature": 0, "max_tokens": 40}),
}


def chats(count: int) -> list[list[dict[str, str]]]:
    """The first of the built-in questions, as messages."""
    return [json.loads(line)["messages"] for line in BUILT_IN_PROMPTS.read_text(encoding="utf-8").splitlines()[:count]]
