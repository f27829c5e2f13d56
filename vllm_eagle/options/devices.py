"""What draft trees need of vLLM on each kind of device, filled in before its configuration is built.

On CPU that is our worker. On CUDA (not run on a GPU yet) also:
- vLLM's V1 model runner, which only an environment variable chooses. It is set, and stays set: workers are processes that read it
  again. So engines without trees that are started later in the same process get the V1 runner, too.
- CUDA graphs between attention layers and none around them: a graph of a whole step would hold attention without its tree.

What users have set is left alone here; support.py refuses what does not fit. The attention backend is chosen in the worker, which
also puts ours in its place (attention/cuda.py).
"""

import copy
import os
from typing import Any

CPU_WORKER = "vllm_eagle.engine.v1.cpu_worker.EagleTreeCPUWorker"
CUDA_WORKER = "vllm_eagle.engine.v1.gpu_worker.EagleTreeGPUWorker"
V2_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


def worker_cls() -> str:
    """Name of our worker for this machine's platform.

    Raises:
        ValueError: no worker of ours runs on it.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return CPU_WORKER
    if current_platform.is_cuda():
        return CUDA_WORKER
    raise ValueError(
        f"draft trees run on CPU and CUDA, not on {current_platform.device_name}; "
        "remove the draft-tree options to serve without trees"
    )


def is_tree_mode(speculative_config: Any) -> bool:
    """Whether vLLM's SpeculativeConfig belongs to an engine with our worker."""
    if speculative_config is None or speculative_config.target_parallel_config is None:
        return False
    return str(speculative_config.target_parallel_config.worker_cls).startswith("vllm_eagle.")


def fill_in(args: Any) -> None:
    """Complete `args`, vLLM's EngineArgs with a speculative_config.

    Raises:
        ValueError: the environment asks for vLLM's V2 runner.
    """
    args.worker_cls = worker_cls()
    if args.worker_cls != CUDA_WORKER:
        return
    from vllm import envs
    from vllm.config import CUDAGraphMode

    if envs.VLLM_USE_V2_MODEL_RUNNER:
        raise ValueError(f"{V2_RUNNER}=1 contradicts draft trees, which need vLLM's V1 model runner; unset it")
    os.environ[V2_RUNNER] = "0"
    if args.compilation_config.cudagraph_mode is None:
        args.compilation_config = copy.copy(args.compilation_config)  # the caller's own object
        args.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
