"""vLLM's V2 model runner on a CPU, its kernels and ours run by Triton's interpreter: the engine of GPUs, end to end, without one.

What stands between stock vLLM 0.32 and that, all of it here:

- Triton has no driver for CPUs: a fake one says that it is active, and the interpreter runs what is launched.
- vLLM's Triton kernel of top-k and top-p does not run in the interpreter (an integer argument has no `.to`): its torch one does.
- vLLM's kernel that writes to the cache asks for a GPU's compute capability.
- vLLM's CPU platform switches asynchronous scheduling off, and its CPU worker names a runner.
- Triton is looked for when vLLM is imported, so an engine of this kind runs in a process of its own: `Bed`.

It cannot show races, CUDA graphs, 16-bit arithmetic, FlashAttention, or speed.
"""

import multiprocessing
import os
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "kv_cache_memory_bytes": 1 << 28,
    "enforce_eager": True,
    "max_num_seqs": 4,
    "max_model_len": 512,
    "disable_log_stats": False,
}


@dataclass(frozen=True, slots=True)
class Case:
    """An engine and what it is asked; everything can be sent to another process."""

    model: str
    prompts: Sequence[list[int]]
    params: Sequence[dict[str, Any]]  # of SamplingParams
    engine: dict[str, Any] = field(default_factory=dict)  # engine arguments; none of trees: plain
    attention: str = "triton"  # or "cpu": vLLM's CPU attention and our operator
    is_async: bool = False
    patches: tuple[str, ...] = ()  # names of functions in breakages.py
    audit: bool = False  # record what reads values on the host (audit.py): stats["host_reads"]


@dataclass(frozen=True, slots=True)
class Answers:
    """What came out."""

    token_ids: list[list[int]]
    logprobs: list[Any]
    stats: dict[str, Any]


class Bed:
    """Runs cases, one after the other, in a process that imports vLLM as a machine with Triton would."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare)

    def run(self, case: Case) -> Answers:
        """An engine of its own for every case."""
        return self._pool.submit(_run, case).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def _prepare() -> None:
    os.environ |= {
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TORCHDYNAMO_DISABLE": "1",
    }
    import triton.backends
    from triton.backends.compiler import GPUTarget

    class Driver:
        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cpu", 0, 1)

    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=Driver, compiler=None)
    import torch

    torch.cuda.get_device_capability = lambda *args, **kwargs: (9, 0)
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.apply_top_k_top_p_triton = lambda logits, k, p: topk_topp_sampler.apply_top_k_top_p_pytorch(logits, k, p)
    from vllm_eagle import plugin
    from vllm_eagle.engine import support
    from vllm_eagle.options import devices

    worker = "tests.engine.v2.worker.TreeV2Worker"
    devices.CPU_WORKER = worker
    devices.is_tree_mode = lambda config: config is not None and config.target_parallel_config.worker_cls == worker
    plugin.SCHEDULER = None
    support.RULES[:] = [rule for rule in support.RULES if rule.feature not in ("vLLM's V2 model runner", "async scheduling")]


def _run(case: Case) -> Answers:
    from vllm import LLM, SamplingParams

    from tests.engine.v2 import audit

    arguments = ENGINE | case.engine
    with _async(case.is_async), _broken(case.patches):
        if "spec_model" in arguments:
            from tests.engine.v2 import worker

            worker.register(case.attention)
        llm = LLM(case.model, **arguments)
        try:
            prompts = [{"prompt_token_ids": ids} for ids in case.prompts]
            with audit.recorded() if case.audit else nullcontext():
                outputs = llm.generate(prompts, [SamplingParams(**params) for params in case.params], use_tqdm=False)
            stats = llm.collective_rpc("tree_stats")[0] if "spec_model" in arguments else {}
            if case.audit:
                stats["host_reads"] = dict(audit.found)
        finally:
            llm.llm_engine.engine_core.shutdown()
    return Answers(
        [list(output.outputs[0].token_ids) for output in outputs], [output.outputs[0].logprobs for output in outputs], stats
    )


@contextmanager
def _async(wanted: bool) -> Iterator[None]:
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check(cls: type, config: Any) -> None:
        stock(cls, config)
        config.scheduler_config.async_scheduling = wanted

    CpuPlatform.check_and_update_config = classmethod(check)  # type: ignore[assignment]
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = classmethod(stock)  # type: ignore[assignment]


@contextmanager
def _broken(patches: tuple[str, ...]) -> Iterator[None]:
    from contextlib import ExitStack

    from tests.engine.v2 import breakages

    with ExitStack() as stack:
        for name in patches:
            stack.enter_context(getattr(breakages, name)())
        yield


def prompts_of(model: Path, number: int) -> list[list[int]]:
    """The first built-in questions, through the model's template."""
    from vllm_eagle.bench.engines.offline import encode_prompts

    return encode_prompts(str(model), None, number)
