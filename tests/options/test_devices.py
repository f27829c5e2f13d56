"""What is chosen for CPU and for CUDA. No GPU here: CUDA's part is checked as far as configuration, signatures and devices go."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec, UniformTypeKVCacheSpecs
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from tests.engine.engines import ENGINE, trees
from vllm_eagle import plugin
from vllm_eagle.attention.cpu import TreeCPUAttentionImpl
from vllm_eagle.attention.interface import TreeAttention
from vllm_eagle.commands import doctor
from vllm_eagle.engine import cuda_seams, seams
from vllm_eagle.engine.filters import Filters
from vllm_eagle.engine.layers import blocks_are_given_back, target_layers
from vllm_eagle.engine.v1 import first_pass
from vllm_eagle.engine.v1.backlog import Piece
from vllm_eagle.engine.v1.cpu_runner import EagleTreeCPUModelRunner
from vllm_eagle.engine.v1.cpu_worker import EagleTreeCPUWorker
from vllm_eagle.engine.v1.first_pass import FirstPass, passes
from vllm_eagle.engine.v1.proposer import EagleTreeProposer
from vllm_eagle.engine.v1.runner import EagleTreeRunner
from vllm_eagle.engine.v1.scheduler import EagleTreeScheduler as V1Scheduler
from vllm_eagle.engine.worker import EagleTreeWorker
from vllm_eagle.options import devices
from vllm_eagle.options.engine_args import engine_args


class Platform:
    device_name = "some device"

    def __init__(self, name: str):
        self._name = name

    def is_cpu(self) -> bool:
        return self._name == "cpu"

    def is_cuda(self) -> bool:
        return self._name == "cuda"


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Pretend to run on a platform; the environment is put back."""
    monkeypatch.setenv(devices.V2_RUNNER, "")
    monkeypatch.delenv(devices.V2_RUNNER)
    return lambda name: monkeypatch.setattr("vllm.platforms.current_platform", Platform(name))


def asked(random_models: dict[str, Path], **changes: Any) -> EngineArgs:
    """Engine arguments of a user who asks for trees."""
    return EngineArgs(model=str(random_models["target"]), **(ENGINE | trees(random_models["eagle"]) | changes))


def fresh(random_models: dict[str, Path], **changes: Any) -> EngineArgs:
    """Likewise, with nothing in it of this machine's engine."""
    head = {"model": str(random_models["eagle"]), "num_speculative_tokens": 8}
    return EngineArgs(
        model=str(random_models["target"]), speculative_config=head, additional_config={"vllm_eagle": {}}, **(ENGINE | changes)
    )


@pytest.mark.parametrize(
    ("platform", "expected", "other"), [("cpu", devices.CPU, devices.CUDA), ("cuda", devices.CUDA, devices.CPU)]
)
def test_the_engine_goes_by_platform(
    platform: str, expected: devices.Engine, other: devices.Engine, on: Callable[[str], None], random_models: dict[str, Path]
) -> None:
    args = fresh(random_models)
    on(platform)
    plugin._ask_for_trees(args)
    for found in (vars(args), engine_args(random_models["eagle"])):
        assert (found["worker_cls"], found["scheduler_cls"]) == (expected.worker_cls, expected.scheduler_cls)
        assert found.get("async_scheduling") is (None if expected.is_v2 else False)  # vLLM's own choice on CUDA
        assert found["speculative_config"]["disable_padded_drafter_batch"] is not expected.is_v2
    with pytest.raises(ValueError, match="contradicts draft trees, which need their own worker"):
        plugin._ask_for_trees(fresh(random_models, worker_cls=other.worker_cls))
    with pytest.raises(ValueError, match="contradicts draft trees, which need their own scheduler"):
        plugin._ask_for_trees(fresh(random_models, scheduler_cls=other.scheduler_cls))
    padded = fresh(random_models)
    padded.speculative_config["disable_padded_drafter_batch"] = expected.is_v2
    with pytest.raises(ValueError, match=f"disable_padded_drafter_batch={str(expected.is_v2).lower()} contradicts draft trees"):
        plugin._ask_for_trees(padded)


def test_other_platforms_are_refused(on: Callable[[str], None], random_models: dict[str, Path]) -> None:
    args = asked(random_models)
    on("rocm")
    with pytest.raises(ValueError, match="draft trees run on CPU and CUDA, not on some device"):
        plugin._ask_for_trees(args)


needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs triton: pip install --no-deps -r vllm_eagle/locks/interop.lock"
)


@needs_triton
def test_workers_and_schedulers_are_found_by_name() -> None:
    from vllm_eagle.engine.v2.scheduler import EagleTreeScheduler
    from vllm_eagle.engine.v2.worker import EagleTreeGPUWorker

    assert resolve_obj_by_qualname(devices.CPU.worker_cls) is EagleTreeCPUWorker
    assert resolve_obj_by_qualname(devices.CPU.scheduler_cls) is V1Scheduler
    assert resolve_obj_by_qualname(devices.CUDA.worker_cls) is EagleTreeGPUWorker
    assert resolve_obj_by_qualname(devices.CUDA.scheduler_cls) is EagleTreeScheduler


@needs_triton
@pytest.mark.parametrize("is_async", [False, True])
def test_the_scheduler_is_asynchronous_where_vllms_is(is_async: bool) -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from vllm_eagle.engine.v2.scheduler import EagleTreeScheduler

    config = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=is_async))
    found = EagleTreeScheduler.__new__(EagleTreeScheduler, vllm_config=config)
    assert isinstance(found, EagleTreeScheduler)
    assert isinstance(found, AsyncScheduler) is is_async


@pytest.mark.parametrize(("platform", "wanted", "runner"), [("cuda", "0", "V2"), ("cpu", "1", "V1")])
def test_the_other_model_runner_is_refused(
    platform: str,
    wanted: str,
    runner: str,
    on: Callable[[str], None],
    random_models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = asked(random_models)
    on(platform)
    monkeypatch.setenv(devices.V2_RUNNER, wanted)
    reason = f"VLLM_USE_V2_MODEL_RUNNER={wanted} contradicts draft trees, which run in vLLM's {runner} model runner on .*; unset it"
    with pytest.raises(ValueError, match=reason):
        devices.fill_in(args)
    monkeypatch.setenv(devices.V2_RUNNER, "1" if wanted == "0" else "0")
    devices.fill_in(args)


@pytest.mark.parametrize(("platform", "has_triton", "expected"), [("cuda", True, None), ("cpu", False, None), ("cpu", True, "0")])
def test_v1_is_kept_on_cpus_where_vllm_would_take_v2(
    platform: str,
    has_triton: bool,
    expected: str | None,
    on: Callable[[str], None],
    random_models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = asked(random_models)
    on(platform)
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", has_triton)
    devices.fill_in(args)
    assert os.environ.get(devices.V2_RUNNER) == expected
    if platform == "cpu":
        assert args.compilation_config.cudagraph_mode is None


@pytest.mark.parametrize("mode", [None, CUDAGraphMode.NONE, CUDAGraphMode.FULL])
def test_cuda_graphs_are_left_to_vllm_and_the_user(
    mode: CUDAGraphMode | None, on: Callable[[str], None], random_models: dict[str, Path]
) -> None:
    given = CompilationConfig(cudagraph_mode=mode)
    args = asked(random_models, compilation_config=given)
    on("cuda")
    devices.fill_in(args)
    assert args.compilation_config.cudagraph_mode == given.cudagraph_mode == mode


def test_the_worker_refuses_the_other_runner(random_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = asked(random_models).create_engine_config()
    EagleTreeWorker.check(config)
    monkeypatch.setenv(devices.V2_RUNNER, "1")
    with pytest.raises(ValueError, match="vLLM's V2 model runner has no trees on CPUs; set VLLM_USE_V2_MODEL_RUNNER=0"):
        EagleTreeCPUWorker(config, 0, 0, "")


def classes() -> list[tuple[type, type, type]]:
    """Ours, what of it comes first, and vLLM's."""
    found: list[tuple[type, type, type]] = [
        (EagleTreeCPUModelRunner, EagleTreeRunner, CPUModelRunner),
        (EagleTreeCPUWorker, EagleTreeWorker, CPUWorker),
    ]
    if find_spec("triton") is not None:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner
        from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator
        from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

        from vllm_eagle.engine.v2 import runner, sampler, scheduler, speculator, worker

        found += [
            (runner.EagleTreeRunner, runner.EagleTreeRunner, GPUModelRunner),
            (speculator.TreeSpeculator, speculator.TreeSpeculator, EagleSpeculator),
            (sampler.TreeSampler, sampler.TreeSampler, RejectionSampler),
            (scheduler.AsyncEagleTreeScheduler, scheduler.EagleTreeScheduler, AsyncScheduler),
            (worker.EagleTreeGPUWorker, EagleTreeWorker, Worker),
        ]
    return found


CLASSES = classes()


@pytest.mark.parametrize(("cls", "mixin", "base"), CLASSES, ids=lambda x: x.__name__)
def test_ours_come_before_vllms(cls: type, mixin: type, base: type) -> None:
    order = cls.__mro__
    assert order.index(mixin) < order.index(base)
    ours = [c for c in order if c.__module__.startswith("vllm_eagle.")]
    assert list(order[: len(ours)]) == ours


BUILT_BY_US = {"EagleSpeculator", "RejectionSampler"}


@pytest.mark.parametrize(("cls", "base"), [(cls, base) for cls, _, base in CLASSES], ids=lambda x: x.__name__)
def test_overrides_take_what_vllm_passes(cls: type, base: type) -> None:
    """Every parameter of vLLM's method, by position and by name, or anything."""
    overridden = 0
    for ours in (c for c in cls.__mro__ if c.__module__.startswith("vllm_eagle.")):
        for name, method in vars(ours).items():
            if not inspect.isfunction(method) or not hasattr(base, name):
                continue
            if name == "__init__" and base.__name__ in BUILT_BY_US:
                continue
            overridden += 1
            expected = list(inspect.signature(inspect.unwrap(getattr(base, name))).parameters.values())
            found = inspect.signature(inspect.unwrap(method)).parameters
            if any(p.kind is p.VAR_KEYWORD for p in found.values()):
                assert any(p.kind is p.VAR_POSITIONAL for p in found.values()), name
                continue
            assert list(found)[: len(expected)] == [p.name for p in expected], name
            required = [p for p in expected[1:] if p.default is p.empty]
            inspect.signature(inspect.unwrap(method)).bind(*[None] * len(expected[: 1 + len(required)]))
    assert overridden >= 1


@needs_triton
def test_cudas_worker_compiles_before_vllm_watches_for_compilations(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's monitor fails whatever is compiled after it, or logs it as something that a request waited for."""
    from vllm_eagle.engine.v2 import worker

    order: list[str] = []
    found = worker.EagleTreeGPUWorker.__new__(worker.EagleTreeGPUWorker)
    found.model_config, found.parallel_config = SimpleNamespace(seed=0), SimpleNamespace(data_parallel_index=0)
    found.model_runner = SimpleNamespace(
        forget_warm_up=lambda: order.append("forget"), measure_costs=lambda: order.append("measure")
    )
    monkeypatch.setattr(worker, "warm_up", lambda runner: order.append("compile"))
    monkeypatch.setattr(Worker, "_maybe_activate_jit_monitor", lambda self: order.append("monitor"))
    found._maybe_activate_jit_monitor()
    assert order == ["compile", "forget", "measure", "monitor"]
    assert worker.EagleTreeGPUWorker.compile_or_warm_up_model is Worker.compile_or_warm_up_model
    source = inspect.getsource(getattr(Worker, "_compile_or_warm_up_model", Worker.compile_or_warm_up_model))  # 0.33 or 0.32
    assert source.index("capture_model()") < source.index("self._maybe_activate_jit_monitor()")


def test_doctor_says_what_to_run_first_on_a_gpu(on: Callable[[str], None]) -> None:
    on("cuda")
    (detail,) = [detail for _, what, detail in doctor._findings() if what == "device"]
    assert "first run: vllm-eagle gpu-check" in detail


@needs_triton
def test_what_is_overridden_on_cuda_is_as_expected() -> None:
    assert list(seams._changed([*cuda_seams.of_attention(), *cuda_seams.of_the_runner()])) == []


def test_the_runner_of_a_finished_cpu_worker_can_change_its_class() -> None:
    """CPUWorker builds its runner in place."""
    runner = CPUModelRunner.__new__(CPUModelRunner)
    runner.__class__ = EagleTreeCPUModelRunner
    assert isinstance(runner, EagleTreeRunner)


@needs_triton
def test_cudas_worker_leaves_torch_alone() -> None:
    """Importing vLLM's CPU worker replaces streams, events and copies of torch by stand-ins."""
    code = (
        "import sys, vllm_eagle.engine.v2.worker\n"
        "assert not [name for name in sys.modules if name.startswith(('vllm.v1.worker.cpu.', 'vllm.v1.worker.cpu_worker'))]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_cpu_has_the_interface_of_attention() -> None:
    assert issubclass(TreeCPUAttentionImpl, TreeAttention)


def test_layers_are_compacted_with_those_alike() -> None:
    """A group of the cache may hold layers of several shapes, some of which share one cache; the head's is left out."""
    caches = {"a": torch.zeros(4, 2, 16, 8), "b": torch.zeros(4, 2, 16, 8), "c": torch.zeros(4, 1, 16, 8), "head": torch.zeros(4)}
    caches["a again"] = caches["a"]
    layers = {name: SimpleNamespace(kv_cache=cache) for name, cache in caches.items()}
    config = SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=list(caches))])
    found = [
        (gid, [layer.kv_cache.data_ptr() for layer in alike])
        for gid, alike in target_layers(config, layers, {"head"})  # type: ignore[arg-type]
    ]
    assert found == [(0, [caches["a"].data_ptr(), caches["b"].data_ptr()]), (0, [caches["c"].data_ptr()])]


def test_a_head_with_a_window_gives_blocks_back() -> None:
    """To others: what was put off may not be written there any more. A window that the cache does not know of changes nothing."""
    kind = {"block_size": 16, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    whole, known = FullAttentionSpec(**kind), FullAttentionSpec(**kind, sliding_window=64)
    sliding = SlidingWindowSpec(**kind, sliding_window=64)

    def given_back(target: Any, head: Any) -> bool:
        groups = [
            SimpleNamespace(layer_names=["a"], kv_cache_spec=target),
            SimpleNamespace(layer_names=["head"], kv_cache_spec=head),
        ]
        return blocks_are_given_back(SimpleNamespace(kv_cache_groups=groups), {"head"})  # type: ignore[arg-type]

    assert [given_back(*pair) for pair in ((whole, whole), (sliding, known), (whole, sliding))] == [False, False, True]
    of_unlike = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": sliding, "head": whole})
    shared = SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=["a", "head"], kv_cache_spec=of_unlike)])
    assert not blocks_are_given_back(shared, {"head"})  # type: ignore[arg-type]
    assert blocks_are_given_back(shared, {"a"})  # type: ignore[arg-type]


@pytest.mark.parametrize(("of_the_head", "puts_off"), [("a", False), ("head", True)])
def test_nothing_is_put_off_for_such_a_head(of_the_head: str, puts_off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = {"block_size": 16, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    specs = {"a": SlidingWindowSpec(**kind, sliding_window=64), "head": FullAttentionSpec(**kind)}
    groups = [SimpleNamespace(layer_names=[name], kv_cache_spec=spec) for name, spec in specs.items()]
    monkeypatch.setattr(EagleProposer, "initialize_attn_backend", lambda *args: None)
    found = EagleTreeProposer.__new__(EagleTreeProposer)
    found._draft_attn_layer_names = {of_the_head}
    found.initialize_attn_backend(SimpleNamespace(kv_cache_groups=groups))  # type: ignore[arg-type]
    assert found.puts_off is puts_off


# The device "meta" refuses, as a GPU does, to be mixed with tensors of the host.


def on_meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_filters_stay_on_the_device() -> None:
    fields = {"top_k": on_meta(4), "top_p": on_meta(4, dtype=torch.float32), "temperature": on_meta(4, dtype=torch.float32)}
    chosen = on_meta(2, dtype=torch.long)
    logits = on_meta(2, 3, 100, dtype=torch.float32)
    assert Filters.of(SimpleNamespace(**fields), chosen)(logits).device.type == "meta"  # type: ignore[arg-type]
    without_temperature = fields | {"temperature": None}
    assert Filters.of(SimpleNamespace(**without_temperature), chosen)(logits).device.type == "meta"  # type: ignore[arg-type]


class Waiting:
    """A backlog of one request, and of none of the others."""

    def keep(
        self, token_ids: torch.Tensor, positions: torch.Tensor, features: torch.Tensor, parts: dict[str, tuple[int, range]]
    ) -> None:
        assert positions.device.type == features.device.type == "meta"
        assert parts == {"c": (7, range(4, 6))}

    def take(self, req_id: str) -> Piece | None:
        return Piece(2, on_meta(5), on_meta(5), on_meta(5, 8, dtype=torch.float32)) if req_id == "b" else None


def test_the_heads_first_pass_stays_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    host = torch.tensor([0, 3, 4, 6], dtype=torch.int32)
    metadata = CommonAttentionMetadata(
        query_start_loc=on_meta(4),
        query_start_loc_cpu=host,
        seq_lens=on_meta(3),
        seq_lens_cpu_upper_bound=torch.tensor([3, 8, 9]),
        num_reqs=3,
        num_actual_tokens=6,
        max_query_len=3,
        max_seq_len=9,
        block_table_tensor=on_meta(3, 4),
        slot_mapping=on_meta(6, dtype=torch.long),
    )
    whole = FirstPass(on_meta(6), on_meta(3), on_meta(6, dtype=torch.long), on_meta(6, 8, dtype=torch.float32), metadata)
    # vLLM's CPU worker replaces this function by one that never leaves the host. Nothing is read back: meta tensors have no values.
    monkeypatch.setattr(
        first_pass, "async_tensor_h2d", lambda data, device, dtype=None: torch.as_tensor(data, dtype=dtype).to(device)
    )
    at_once = list(passes(whole, ["a", "b", "c"], [0, 1], [2], Waiting(), 16, 9))  # type: ignore[arg-type]
    one_by_one = list(passes(whole, ["a", "b", "c"], [0, 1], [2], Waiting(), 16, 4))  # type: ignore[arg-type]
    assert [each.metadata.num_actual_tokens for each in (*at_once, *one_by_one)] == [9, 4, 1, 4]
    for each in (*at_once, *one_by_one):
        tensors = [each.token_ids, each.next_token_ids, each.positions, each.features, each.metadata.query_start_loc]
        tensors += [each.metadata.seq_lens, each.metadata.block_table_tensor, each.metadata.slot_mapping]
        assert all(tensor.device.type == "meta" for tensor in tensors)
        assert each.metadata.query_start_loc_cpu.device.type == "cpu"
