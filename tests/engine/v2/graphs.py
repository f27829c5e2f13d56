"""CUDA graphs without a GPU: what is captured is recorded, and a replay runs exactly that again, on the same memory.

Recorded are torch's operators, as they are dispatched, and launches of Triton kernels. Python between them is not, so whatever it
decided stays decided: as in a CUDA graph. What a GPU would not capture or replay is refused:

- values that are read on the host, results whose size depends on values, values that come from the host;
- memory that a graph reads or writes, and that has been given back when it is replayed.

A GPU computes nothing while it captures; here the capture itself runs. Memory that a graph allocates stays its own.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.overrides import _pop_mode_temporarily as function_mode_paused
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _pop_mode_temporarily as dispatch_mode_paused
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.engine.v2.audit import READS

TO_HOST = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__", "pin_memory"}
FROM_HOST = {"lift_fresh", "lift_fresh_copy", "_pin_memory"}
# vLLM's operators whose Python reads what is not recorded
OPAQUE = {f"unified_{kind}{name}" for kind in ("", "mla_") for name in ("attention_with_output", "kv_cache_update")}
counts: Counter[str] = Counter()


class RefusedError(RuntimeError):
    """A GPU would not have captured or replayed this."""


class Graph:
    """In the place of `torch.cuda.CUDAGraph`."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.steps: list[Callable[[], object]] = []
        self.borrowed: dict[int, torch.Tensor] = {}  # by storage: memory that is not the graph's own

    def replay(self) -> None:
        """Run all that was recorded."""
        gone = [tuple(tensor.shape) for storage, tensor in self.borrowed.items() if _num_users(storage) <= _num_held[storage]]
        if gone:
            raise RefusedError(f"replayed, though memory of shapes {gone} has been given back")
        counts["replayed"] += 1
        with torch.inference_mode():
            for step in self.steps:
                step()


_held: dict[tuple[Any, ...], torch.Tensor] = {}  # tensors of ours on the memory that graphs use
_num_held: Counter[int] = Counter()  # by storage


def _num_users(storage: int) -> int:
    return torch._C._storage_Use_Count(storage) - 1  # without Python's own object of the storage


def forget() -> None:
    """Let go of all graphs' memory, and count anew."""
    _held.clear()
    _num_held.clear()
    counts.clear()


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph):
        super().__init__()
        self._graph, self._own = graph, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        sized_by_values = name == "repeat_interleave" and not kwargs.get("output_size")
        masked = name == "index" and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if name in READS or sized_by_values or masked:
            raise RefusedError(f"captured: {name} reads values on the host")
        if name in FROM_HOST:
            raise RefusedError(f"captured: {name} brings values from the host")
        if name in OPAQUE:
            raise RefusedError(f"captured: {name} cannot be seen through")
        own_args, own_kwargs = self.keep((args, kwargs))
        found = func(*args, **kwargs)
        given, results = ([x for x in tree_leaves(y) if isinstance(x, torch.Tensor)] for y in ((args, kwargs), found))
        storages = {x.untyped_storage()._cdata for x in given}
        fresh = [x for x in results if x.untyped_storage()._cdata not in storages]
        self._own |= {x.untyped_storage()._cdata for x in fresh}
        if (fresh or func._schema.is_mutable) and not name.startswith(("empty", "new_empty")):
            self._graph.steps.append(_again(func, own_args, own_kwargs, self.keep(results)))
        return found

    def keep(self, structure: Any) -> Any:
        """The same, with tensors of ours on the same memory."""
        return tree_map_only(torch.Tensor, self._keep, structure)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        storage, view = memory._cdata, (tensor.storage_offset(), tensor.shape, tensor.stride())
        key = (storage, tensor.dtype, *view)
        if key not in _held:
            _held[key] = torch.empty(0, dtype=tensor.dtype).set_(memory, *view)
            _num_held[storage] += 1
        if storage not in self._own and tensor.numel():
            self._graph.borrowed[storage] = _held[key]
        return _held[key]

    def launch(self, run: Callable[..., None], executor: Any, args: Any, kwargs: Any) -> None:
        """Record a launch of a Triton kernel, and run it; the interpreter's own operators are no part of it."""
        own_args, own_kwargs = self.keep((args, kwargs))
        self._graph.steps.append(lambda: run(executor, *own_args, **own_kwargs))
        with function_mode_paused(), dispatch_mode_paused():
            run(executor, *args, **kwargs)


def _again(func: Any, args: Any, kwargs: Any, places: Any) -> Callable[[], None]:
    def run() -> None:
        found = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, torch.Tensor)]
        for place, result in zip(places, found, strict=True):
            if result.data_ptr() != place.data_ptr():
                place.copy_(result)

    return run


class _NothingToTheHost(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in TO_HOST:
            raise RefusedError(f"captured: {func.__name__} reads values on the host")
        return func(*args, **(kwargs or {}))


_capturing: list[_Recorder] = []


@contextmanager
def captured(graph: Graph, pool: Any = None, stream: Any = None, **kwargs: Any) -> Iterator[None]:
    """In the place of `torch.cuda.graph`."""
    recorder = _Recorder(graph)
    _capturing.append(recorder)
    try:
        with torch.inference_mode(), _NothingToTheHost(), recorder:
            yield
    finally:
        _capturing.pop()
    counts["captured"] += 1


def launched(run: Callable[..., None]) -> Callable[..., None]:
    """`GridExecutor.__call__`, the launch of a kernel in Triton's interpreter, recorded while a graph is captured."""

    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        if _capturing:
            _capturing[-1].launch(run, self, args, kwargs)
        else:
            run(self, *args, **kwargs)

    return recorded


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """What stands in for a compiled kernel: nobody sees into it, and while a graph is captured it is recorded as one launch."""

    def run(*args: Any, **kwargs: Any) -> None:
        if _capturing:
            _capturing[-1].launch(lambda its, *own, **others: its(*own, **others), function, args, kwargs)
            return
        with dispatch_mode_paused() if torch._C._len_torch_dispatch_stack() else nullcontext():
            function(*args, **kwargs)

    return run


@contextmanager
def installed() -> Iterator[None]:
    """vLLM captures and replays through these graphs, on a CPU."""
    from triton.runtime.interpreter import GridExecutor
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.gpu import cudagraph_utils

    replaced: list[tuple[Any, str, Any]] = [
        (torch.cuda, "CUDAGraph", Graph),
        (torch.cuda, "graph", captured),
        (torch.accelerator, "empty_cache", lambda: None),
        (torch.accelerator, "synchronize", lambda: None),
        (torch.accelerator, "get_memory_info", lambda: (0, 0)),
        (cudagraph_utils, "graph_capture", lambda device: nullcontext()),
        (cudagraph_utils, "capture_pool", lambda pool, config: nullcontext()),
        (cudagraph_utils, "current_stream", lambda: None),
        (CpuPlatform, "get_global_graph_pool", lambda self: None),
        (CpuPlatform, "opaque_attention_op", classmethod(lambda cls: False)),  # else all of attention were one operator
        (GridExecutor, "__call__", launched(GridExecutor.__call__)),
    ]
    with ExitStack() as stack:
        for place, name, value in replaced:
            stack.enter_context(patch.object(place, name, value))
        stack.callback(forget)
        yield
