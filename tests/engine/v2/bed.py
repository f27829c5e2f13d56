"""vLLM's V2 model runner on a CPU, its kernels and ours run by Triton's interpreter: the engine of GPUs, end to end, without one.

What stands between stock vLLM 0.32 and that, all of it here:

- Triton has no driver for CPUs: a fake one says that it is active, and the interpreter runs what is launched.
- vLLM's Triton kernel of top-k and top-p does not run in the interpreter (an integer argument has no `.to`): its torch one does.
- vLLM's kernel that writes to the cache asks for a GPU's compute capability.
- vLLM's CPU platform switches asynchronous scheduling off, and its CPU worker names a runner.
- Triton is looked for when vLLM is imported, so an engine of this kind runs in a process of its own: `Bed`. Ranks of tensor
  parallelism are forked from it, so they have all of this; vLLM would spawn them. Forked threads would hang: `fresh`. Ranks talk
  through gloo: with the memory that vLLM has them share on CPUs they would keep each other from work while they wait.

It cannot show races, 16-bit arithmetic, FlashAttention's own kernels (flash_by_torch.py), or speed. CUDA graphs: graphs.py.
"""

import multiprocessing
import os
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

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
    params: Sequence[dict[str, Any]]  # of SamplingParams; "structured": of StructuredOutputsParams
    adapters: Sequence[str] = ()  # folders of LoRA adapters; request i gets the i-th, the others none
    engine: dict[str, Any] = field(default_factory=dict)  # engine arguments; none of trees: plain
    # Or "cpu": vLLM's CPU attention and our operator; "flash", "xformers": CUDA's others, their kernels by torch; "exact": as
    # "triton", but in float64 (exact_attention.py), for plain, too; "stock": vLLM's Triton attention, for plain.
    attention: str = "triton"
    is_async: bool = False
    patches: tuple[str, ...] = ()  # names of functions in breakages.py
    pictures: str = ""  # a family of tests/engine/pictures.py, whose prompts are asked; no prompts
    sessions: bool = False  # of several turns (tests/engine/test_sessions.py), one for each of `params`; no prompts
    capture_sizes: tuple[int, ...] = ()  # rows for which passes of decoding requests are captured (graphs.py); none: no graphs
    audit: bool = False  # record what reads values on the host (audit.py): stats["host_reads"]


@dataclass(frozen=True, slots=True)
class Answers:
    """What came out."""

    token_ids: list[list[int]]  # one after the other, n of each request
    logprobs: list[Any]
    prompt_logprobs: list[Any]
    stats: dict[str, Any]
    recent: list[dict[str, Any]]  # the last trees


class Bed:
    """Runs cases, one after the other, in a process that imports vLLM as a machine with Triton would."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare)

    def run(self, case: Case) -> Answers:
        """An engine of its own for every case."""
        return self._pool.submit(_run, case).result()

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """A function in the process, where Triton is."""
        return self._pool.submit(function, *arguments).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()

    @classmethod
    def fresh(cls, case: Case) -> Answers:
        """Run a case in a process of its own, which has no threads yet: its ranks are forked from it."""
        found = cls()
        try:
            return found.run(case)
        finally:
            found.close()


def _prepare() -> None:
    os.environ |= {
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # ranks share the cores that there are
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
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.v1.sample.ops import topk_topp_sampler

    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False

    by_torch = topk_topp_sampler.apply_top_k_top_p_pytorch
    topk_topp_sampler.apply_top_k_top_p_triton = lambda logits, k, p, **others: by_torch(logits, k, p)
    from vllm_eagle.options import devices

    # This machine's engine is that of GPUs, with the bed's worker; vLLM's CPU platform has its say in how steps are scheduled.
    devices.CPU = devices.Engine("CPUs", "tests.engine.v2.worker.TreeV2Worker", devices.CUDA.scheduler_cls, True)


def _run(case: Case) -> Answers:
    from vllm import LLM

    from tests.engine.test_sessions import session
    from tests.engine.v2 import audit, graphs, latents_by_torch

    arguments = ENGINE | case.engine
    prompts: Any = [{"prompt_token_ids": ids} for ids in case.prompts]
    with ExitStack() as stack:
        stack.enter_context(_configured(case))
        stack.enter_context(_broken(case.patches))
        stack.enter_context(latents_by_torch.installed())
        if case.capture_sizes:
            stack.enter_context(graphs.installed())
        if case.attention in ("flash", "xformers"):
            from tests.engine.v2 import flash_by_torch

            stack.enter_context(flash_by_torch.installed(case.attention == "xformers"))
        if case.attention == "exact":
            from tests.engine.v2 import exact_attention

            stack.enter_context(exact_attention.installed())
        if case.pictures:
            from tests.engine import pictures

            stack.enter_context(pictures.seeing(Path(case.model), case.pictures))
            prompts = pictures.prompts()
        from tests.engine.v2 import worker

        has_trees = not {"spec_model", "spec_method"}.isdisjoint(arguments)
        plain = "stock" if case.attention in ("exact", "stock") else None
        worker.register(case.attention if has_trees else plain)
        llm = LLM(case.model, **arguments)
        try:
            if case.sessions:
                turns = [session(llm, _params(each))[0] for each in case.params]
                stats = llm.collective_rpc("eagle_stats")[0] if has_trees else {}
                return Answers([answer for answers in turns for answer in answers], [], [], stats, [])
            with audit.recorded() if case.audit else nullcontext():
                outputs = llm.generate(
                    prompts, [_params(each) for each in case.params], use_tqdm=False, lora_request=_adapters(case)
                )
            stats, recent = ({}, [])
            if has_trees:
                of_ranks, (recent, *_) = (llm.collective_rpc(name) for name in ("eagle_stats", "eagle_recent_trees"))
                stats = of_ranks[0] | {"of_ranks": [dict(each) for each in of_ranks]}
            stats |= {"graphs": dict(graphs.counts)}
            if case.audit:
                stats |= {"host_reads": dict(audit.found), "num_idle": len(audit.idle)}
                stats["idle"] = {number: dict(audit.of_idle_steps(number)) for number, _ in audit.idle}
        finally:
            llm.llm_engine.engine_core.shutdown()
    answers = [answer for output in outputs for answer in output.outputs]
    return Answers(
        [list(answer.token_ids) for answer in answers],
        [answer.logprobs for answer in answers],
        [output.prompt_logprobs for output in outputs],
        stats,
        recent,
    )


def _params(asked: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    asked = dict(asked)
    if "structured" in asked:
        asked["structured_outputs"] = StructuredOutputsParams(**asked.pop("structured"))
    return SamplingParams(**asked)


def _adapters(case: Case) -> list[Any] | None:
    from vllm.lora.request import LoRARequest

    found: list[Any] = [LoRARequest(f"a{i}", i, folder) for i, folder in enumerate(case.adapters, start=1)]
    return [*found, *[None] * (len(case.prompts) - len(found))] if found else None


@contextmanager
def _configured(case: Case) -> Iterator[None]:
    """What vLLM's platform for CPUs has no say in: asynchronous scheduling, and graphs."""
    from vllm.config import CUDAGraphMode
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check(cls: type, config: Any) -> None:
        asked = config.scheduler_config.max_num_batched_tokens, config.cache_config.enable_prefix_caching
        stock(cls, config)
        if config.model_config.use_mla:  # for which it has these switched off
            config.scheduler_config.enable_chunked_prefill = True
            config.scheduler_config.max_num_batched_tokens, config.cache_config.enable_prefix_caching = asked
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        config.scheduler_config.async_scheduling = case.is_async
        if case.capture_sizes:
            compilation = config.compilation_config
            compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
            compilation.cudagraph_capture_sizes = list(case.capture_sizes)
            compilation.max_cudagraph_capture_size = max(case.capture_sizes)

    CpuPlatform.check_and_update_config = classmethod(check)  # type: ignore[assignment]
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = classmethod(stock)  # type: ignore[assignment]


@contextmanager
def _broken(patches: tuple[str, ...]) -> Iterator[None]:
    from tests.engine.v2 import breakages

    with ExitStack() as stack:
        for name in patches:
            stack.enter_context(getattr(breakages, name)())
        yield


def prompts_of(model: Path, number: int) -> list[list[int]]:
    """The first built-in questions, through the model's template."""
    from vllm_eagle.bench.engines.offline import encode_prompts

    return encode_prompts(str(model), None, number)
