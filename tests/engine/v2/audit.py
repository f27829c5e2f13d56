"""Which of our operations read a value on the host: on a GPU each would wait for it. And what decoding without drafts does.

While tests run on a CPU nothing waits, so operators that hand a value to the host, or whose result's size depends on values, are
recorded as they are dispatched, with the line of ours that asked. Of steps in which every request decodes one token and nothing is
drafted, all operators and launches of kernels are, with the function that asked: of plain vLLM, too, to be held against each other.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import vllm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _pop_mode_temporarily as dispatch_mode_paused

import vllm_eagle

ROOTS = {Path(vllm_eagle.__file__).parent: "", Path(vllm.__file__).parent: "vllm/"}
READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2", "unique_consecutive"}
# Views and new memory: no work for a device.
FREE = {"view", "slice", "select", "as_strided", "unsqueeze", "squeeze", "expand", "transpose", "t", "permute", "detach", "alias"}
FREE |= {"empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view", "split", "split_with_sizes", "unbind", "lift_fresh"}
found: Counter[str] = Counter()
idle: list[tuple[int, Counter[str]]] = []  # of each step that only decodes, without drafts: requests, and its operations
_in_idle = False


class _Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        sized_by_values = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        masked = name == "index" and any(x is not None and x.dtype.itemsize == 1 and not x.dtype.is_floating_point for x in args[1])
        if (name in READS or sized_by_values or masked) and (line := _function()) is not None and not line.startswith("vllm/"):
            found[f"{line}: {name}"] += 1
        if _in_idle and name not in FREE:
            idle[-1][1][f"{_function()}: {name}"] += 1
        return func(*args, **(kwargs or {}))

    def launch(self, run: Callable[..., None], executor: Any, args: Any, kwargs: Any) -> None:
        """A kernel; the interpreter's own operators are no part of it."""
        if _in_idle:
            idle[-1][1][f"{_function()}: {getattr(executor.fn, '__name__', 'kernel')}"] += 1
        # Within an operator that is made of others, as attention is on a CPU, nothing is dispatched here anyway.
        with dispatch_mode_paused() if torch._C._len_torch_dispatch_stack() else nullcontext():
            run(executor, *args, **kwargs)


def _function() -> str | None:
    """The innermost function of ours or of vLLM's."""
    frame = sys._getframe(2)
    while frame is not None:
        if (name := _named(frame.f_code.co_filename)) is not None:
            return f"{name} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return None


@cache
def _named(file: str) -> str | None:
    path = Path(file)
    return next((f"{prefix}{path.relative_to(root)}" for root, prefix in ROOTS.items() if root in path.parents), None)


@contextmanager
def recorded() -> Iterator[None]:
    """Record while steps run."""
    from triton.runtime.interpreter import GridExecutor
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from vllm_eagle.engine.v2.runner import EagleTreeRunner

    found.clear()
    idle.clear()
    recorder = _Recorder()
    launched = GridExecutor.__call__

    def watched(stock: Any, is_ours: bool) -> Any:
        def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(self, EagleTreeRunner) == is_ours:
                _begin(scheduler_output)
            return stock(self, scheduler_output, *args, **kwargs)

        return execute_model

    with (
        recorder,
        patch.object(GPUModelRunner, "execute_model", watched(GPUModelRunner.execute_model, False)),
        patch.object(EagleTreeRunner, "execute_model", watched(EagleTreeRunner.execute_model, True)),
        patch.object(GridExecutor, "__call__", lambda self, *args, **kwargs: recorder.launch(launched, self, args, kwargs)),
    ):
        yield


def _begin(scheduled: Any) -> None:
    global _in_idle
    decodes = set(scheduled.num_scheduled_tokens.values()) == {1} and not scheduled.scheduled_new_reqs
    _in_idle = decodes and not scheduled.scheduled_spec_decode_tokens and not scheduled.num_spec_tokens_to_schedule
    if _in_idle:
        idle.append((len(scheduled.num_scheduled_tokens), Counter()))


def of_idle_steps(num_reqs: int) -> Counter[str]:
    """What every step of so many requests does; more is done where a request needs another block, or ends."""
    steps = [operations for number, operations in idle if number == num_reqs]
    return Counter({name: min(step[name] for step in steps) for name in steps[0]}) if steps else Counter()
