"""Run vLLM in this process, with and without trees, and compare."""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from vllm import LLM, RequestOutput, SamplingParams

from tests import starts
from vllm_eagle.bench.engines.drafters import ours

ENGINE = {
    "dtype": "float32",
    "max_model_len": 512,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 28,
    "block_size": 32,
    "max_num_seqs": 64,
    "disable_log_stats": False,
}


@contextmanager
def engine(model: Path, **changes: Any) -> Iterator[LLM]:
    """An in-process engine, shut down at the end so that the next one starts clean."""
    with collected_before_it_starts():
        starts.starts("engine")
        before = time.monotonic()
        llm = LLM(str(model), **(ENGINE | changes))
        starts.started("engine", time.monotonic() - before)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()


@contextmanager
def collected_before_it_starts() -> Iterator[None]:
    """What is left of the engine before is collected now, and nothing until this one has ended.

    Layers of an earlier engine must not be collected while one runs: vLLM's CPU matmul handlers call torch when they are freed,
    which breaks a compilation that is being traced just then, or the process. And vLLM collects ten times while an engine starts
    and stops, half a second each with all that its modules hold. So these are put aside for good when the first engine starts.
    """
    gc.collect()
    if not gc.get_freeze_count():
        gc.freeze()
    gc.disable()
    try:
        with patch.multiple(gc, collect=lambda *generation: 0, freeze=lambda: None, unfreeze=lambda: None):
            yield
    finally:
        gc.enable()


def trees(head: Path, num_draft_tokens: int = 16, **options: Any) -> dict[str, Any]:
    """Engine arguments that switch trees on, as a user of vLLM's own LLM class writes them.

    Without the budget, which decides by the clock, and against trees for models as small as the tests'.
    """
    return ours(str(head), num_draft_tokens, **({"budget": False} | options))


def generate(llm: LLM, prompts: Sequence[list[int]], params: Sequence[SamplingParams] | SamplingParams) -> list[RequestOutput]:
    """Generate from token ids."""
    # Copies: vLLM fills in fields of the parameters that it is given.
    params = params.clone() if isinstance(params, SamplingParams) else [p.clone() for p in params]
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def tokens(outputs: Sequence[RequestOutput]) -> list[list[list[int]]]:
    """Token ids per request and sample."""
    return [[list(sample.token_ids) for sample in output.outputs] for output in outputs]


def assert_same_logprobs(expected: Sequence[RequestOutput], found: Sequence[RequestOutput]) -> None:
    """Same tokens, ranks and, within rounding, values at every position."""
    for one, other in zip(expected, found, strict=True):
        for sample, twin in zip(one.outputs, other.outputs, strict=True):
            assert (sample.logprobs is None) == (twin.logprobs is None)
            assert len(sample.logprobs or []) == len(twin.logprobs or []) == (len(sample.token_ids) if sample.logprobs else 0)
            for position, twin_position in zip(sample.logprobs or [], twin.logprobs or [], strict=True):
                assert position.keys() == twin_position.keys()
                for token, logprob in position.items():
                    assert abs(logprob.logprob - twin_position[token].logprob) < 1e-3
                    assert logprob.rank == twin_position[token].rank


def tree_stats(llm: LLM) -> dict[str, Any]:
    """The worker's counters."""
    return llm.collective_rpc("eagle_stats")[0]
