"""Which of vLLM's engines runs draft trees on each kind of device, filled in before its configuration is built.

- CPU: its V1 model runner. Where Triton for CPUs is installed vLLM would take its V2 runner, unless an environment variable says
  otherwise. It is set, and stays set: workers are processes that read it again.
- CUDA (not run on a GPU yet): its V2 model runner, which vLLM takes there by itself; asynchronous scheduling stays on, and so do
  CUDA graphs as vLLM has them. With FLASH_ATTN and TRITON_ATTN it captures passes of decoding requests as a whole, and drafting;
  with xformers, which cannot be captured, it says so and leaves graphs between attention layers.

What users have set is left alone here; support.py refuses what does not fit. The attention backend is chosen in the worker, which
also puts ours in its place (attention/cuda.py).
"""

import os
from dataclasses import dataclass
from typing import Any

V2_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


@dataclass(frozen=True, slots=True)
class Engine:
    """The engine of a kind of device."""

    device: str  # as users call it
    worker_cls: str
    scheduler_cls: str
    is_v2: bool  # vLLM's V2 model runner, or V1

    @property
    def disable_padded_drafter_batch(self) -> bool:
        """vLLM's option: its V1 runner needs it for trees, and with it nothing is scheduled asynchronously."""
        return not self.is_v2


CPU = Engine(
    "CPUs", "vllm_eagle.engine.v1.cpu_worker.EagleTreeCPUWorker", "vllm_eagle.engine.v1.scheduler.EagleTreeScheduler", False
)
CUDA = Engine("CUDA", "vllm_eagle.engine.v2.worker.EagleTreeGPUWorker", "vllm_eagle.engine.v2.scheduler.EagleTreeScheduler", True)


def engine() -> Engine:
    """That of this machine's platform.

    Raises:
        ValueError: none of ours runs on it.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return CPU
    if current_platform.is_cuda():
        return CUDA
    raise ValueError(
        f"draft trees run on CPU and CUDA, not on {current_platform.device_name}; "
        "remove the draft-tree options to serve without trees"
    )


def is_tree_mode(speculative_config: Any) -> bool:
    """Whether vLLM's SpeculativeConfig belongs to an engine with our worker."""
    if speculative_config is None or speculative_config.target_parallel_config is None:
        return False
    return speculative_config.target_parallel_config.worker_cls in (CPU.worker_cls, CUDA.worker_cls)


def fill_in(args: Any) -> None:
    """Complete `args`, vLLM's EngineArgs with a speculative_config.

    Raises:
        ValueError: the environment asks for the other model runner.
    """
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    ours = engine()
    wanted = envs.VLLM_USE_V2_MODEL_RUNNER
    if wanted is not None and wanted != ours.is_v2:
        own = f"{'V2' if ours.is_v2 else 'V1'} model runner on {ours.device}"
        raise ValueError(f"{V2_RUNNER}={int(wanted)} contradicts draft trees, which run in vLLM's {own}; unset it")
    args.worker_cls, args.scheduler_cls = ours.worker_cls, ours.scheduler_cls
    if not ours.is_v2:
        args.async_scheduling = False
        if HAS_TRITON:
            os.environ[V2_RUNNER] = "0"
