"""Which of our operations read a value on the host: on a GPU each would wait for it. And what we do where nothing is drafted.

While tests run on a CPU nothing waits, so operators that hand a value to the host, or whose result's size depends on values, are
recorded as they are dispatched, with the line of ours that asked. In steps without drafts, before and after, all are.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.utils._python_dispatch import TorchDispatchMode

import vllm_eagle

ROOT = Path(vllm_eagle.__file__).parent
READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2", "unique_consecutive"}
found: Counter[str] = Counter()
when_idle: Counter[str] = Counter()  # all of ours, by function
num_idle = 0  # steps without drafts
_is_idle = False


class _Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        sized_by_values = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        masked = name == "index" and any(x is not None and x.dtype.itemsize == 1 and not x.dtype.is_floating_point for x in args[1])
        if (name in READS or sized_by_values or masked) and (line := _line_of_ours()) is not None:
            found[f"{line}: {name}"] += 1
        if _is_idle and (line := _line_of_ours()) is not None:
            when_idle[line] += 1
        return func(*args, **(kwargs or {}))


def _line_of_ours() -> str | None:
    """The innermost function of ours, unless vLLM's is further in: what that does is its own business."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if ROOT in path.parents:
            return f"{path.relative_to(ROOT)} {frame.f_code.co_name}"
        if "vllm" in path.parts:
            return None
        frame = frame.f_back  # type: ignore[assignment]
    return None


@contextmanager
def recorded() -> Iterator[None]:
    """Record while steps run."""
    global num_idle
    from vllm_eagle.engine.v2.runner import EagleTreeRunner

    found.clear()
    when_idle.clear()
    num_idle, stock = 0, EagleTreeRunner.execute_model

    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        global _is_idle, num_idle
        _is_idle = not scheduler_output.scheduled_spec_decode_tokens and not scheduler_output.num_spec_tokens_to_schedule
        num_idle += _is_idle
        return stock(self, scheduler_output, *args, **kwargs)

    with _Recorder(), patch.object(EagleTreeRunner, "execute_model", execute_model):
        yield
