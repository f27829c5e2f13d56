"""`vllm-eagle demo`: text, tokens per target pass, a drawn tree, wall time, and whether the tokens are plain vLLM's."""

import logging
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.algorithm.tree import DraftTree
from vllm_eagle.bench.engines import drafters
from vllm_eagle.bench.engines.offline import Generated, encode_prompts, engine, generate, prepare_environment
from vllm_eagle.pair import TARGET

NUM_ROUNDS = 3


def run(model: str, head: str, num_draft_tokens: int, max_tokens: int, num_prompts: int) -> int:
    """Generate greedily and sampled, with and without trees, in float32. Returns 0 if all tokens are identical."""
    TreeConfig(num_draft_tokens=num_draft_tokens)
    if max_tokens < 3 or num_prompts < 1:  # the first token comes with the prompt, the last one needs no draft
        raise ValueError("--max-tokens must be at least 3 and --prompts at least 1")
    prepare_environment()
    _quiet()
    print(
        "A small model answers questions of GSM8K style, first as plain vLLM decodes, token by token, then with draft trees:\n"
        "how many tokens each of its passes emits, one of the trees, and whether the answers are the same, token for token.\n"
        "Two engines are started for that; that takes about a minute.\n"
    )
    import numpy as np
    from vllm import SamplingParams

    prompts = encode_prompts(model, None, num_prompts)
    kinds = {
        "greedy": [SamplingParams(temperature=0, max_tokens=max_tokens)] * len(prompts),
        "T = 1, seeded": [SamplingParams(temperature=1, seed=i, max_tokens=max_tokens) for i in range(len(prompts))],
    }
    # float32: in bfloat16 two tokens may be so close that another batch size rounds them the other way.
    common: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": max(map(len, prompts)) + max_tokens + 1,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 28,
    }
    print(f"target {model}\nhead   {head}\nplain vLLM, {len(prompts)} prompts ...", flush=True)
    with engine(model, **common) as llm:
        plain = {kind: _timed(partial(generate, llm, prompts, params)) for kind, params in kinds.items()}
    print(f"vLLM with draft trees of {num_draft_tokens} nodes ...", flush=True)
    with engine(model, **common, **drafters.ours(head, num_draft_tokens, budget=False)) as llm:
        ours = {kind: _timed(partial(generate, llm, prompts, params)) for kind, params in kinds.items()}
        llm.collective_rpc("eagle_trace", args=(1 << 30,))
        generate(llm, prompts[:1], kinds["greedy"][:1])
        steps = llm.collective_rpc("eagle_traced")[0]
        decode: Callable[[int], str] = lambda token: repr(llm.get_tokenizer().decode([token]))  # noqa: E731
        # The step with the longest path shows most; a typical one is shown by tau.
        step = max(steps, key=lambda s: len(s["path"]))
        tree = DraftTree(np.array(step["token_ids"]), np.array(step["parents"]), np.array(step["scores"], dtype=np.float32))
    print(f"\n--- question and answer (greedy)\n{llm.get_tokenizer().decode(prompts[0])}{ours['greedy'][0].texts[0]}")
    print("\n--- the draft tree of that answer that was accepted deepest (* accepted, numbers: confidence of the path)")
    print(tree.draw(decode, accepted=[0, *step["path"]]))
    print(f"emitted in this one target pass: {llm.get_tokenizer().decode(step['emitted'])!r}")
    print(f"\n{'':<16}{'tokens':>8}{'per target pass':>18}{'plain':>10}{'trees':>10}{'identical':>12}")
    identical = True
    for kind in kinds:
        (one, plain_s), (other, ours_s) = plain[kind], ours[kind]
        same = one.token_ids == other.token_ids
        identical &= same
        count = sum(map(len, other.token_ids))
        print(f"{kind:<16}{count:>8}{other.tau:>18.2f}{plain_s:>9.2f}s{ours_s:>9.2f}s{'yes' if same else 'NO':>12}")
    small = "; a model this small measures Python" if model == str(TARGET) else ""
    print(f"\nidentical: {'yes' if identical else 'NO'}  (wall time: median of {NUM_ROUNDS} runs{small})")
    return 0 if identical else 1


def _quiet() -> None:
    """Leave out what is no error: torch warns of what vLLM does with it, and vLLM logs before it reads VLLM_LOGGING_LEVEL."""
    for library in ("vllm", "torch"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def _timed(work: Callable[[], Generated]) -> tuple[Generated, float]:
    """The result and the median time of a few runs after one to warm up."""
    result = work()
    return result, statistics.median(work().seconds for _ in range(NUM_ROUNDS))
