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

import numpy as np
import pytest
import torch
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from tests.engine.engines import ENGINE, engine, trees
from vllm_eagle import plugin
from vllm_eagle.algorithm import compact
from vllm_eagle.algorithm.tree import DraftTree
from vllm_eagle.algorithm.verify import lay_out
from vllm_eagle.attention.cpu import TreeCPUAttentionImpl
from vllm_eagle.attention.interface import TreeAttention
from vllm_eagle.commands import doctor
from vllm_eagle.engine import seams
from vllm_eagle.engine.filters import Filters
from vllm_eagle.engine.v1 import first_pass, gpu_runner
from vllm_eagle.engine.v1.backlog import Piece
from vllm_eagle.engine.v1.cpu_runner import EagleTreeCPUModelRunner
from vllm_eagle.engine.v1.cpu_worker import EagleTreeCPUWorker
from vllm_eagle.engine.v1.first_pass import FirstPass, passes
from vllm_eagle.engine.v1.gpu_runner import EagleTreeGPUModelRunner
from vllm_eagle.engine.v1.gpu_worker import EagleTreeGPUWorker
from vllm_eagle.engine.v1.runner import EagleTreeRunner
from vllm_eagle.engine.worker import EagleTreeWorker
from vllm_eagle.options import devices
from vllm_eagle.options.devices import CPU_WORKER, CUDA_WORKER
from vllm_eagle.options.engine_args import engine_args
from vllm_eagle.pair import HEAD, TARGET


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


@pytest.mark.parametrize(("platform", "expected"), [("cpu", CPU_WORKER), ("cuda", CUDA_WORKER)])
def test_the_worker_goes_by_platform(
    platform: str, expected: str, on: Callable[[str], None], random_models: dict[str, Path]
) -> None:
    args = asked(random_models)
    on(platform)
    plugin._ask_for_trees(args)
    assert args.worker_cls == expected
    assert engine_args(random_models["eagle"])["worker_cls"] == expected
    other = asked(random_models, worker_cls=CPU_WORKER if expected == CUDA_WORKER else CUDA_WORKER)
    with pytest.raises(ValueError, match="contradicts draft trees, which need their own worker"):
        plugin._ask_for_trees(other)


def test_other_platforms_are_refused(on: Callable[[str], None], random_models: dict[str, Path]) -> None:
    args = asked(random_models)
    on("rocm")
    with pytest.raises(ValueError, match="draft trees run on CPU and CUDA, not on some device"):
        plugin._ask_for_trees(args)


@pytest.mark.parametrize(("name", "cls"), [(CPU_WORKER, EagleTreeCPUWorker), (CUDA_WORKER, EagleTreeGPUWorker)])
def test_workers_are_found_by_name(name: str, cls: type) -> None:
    assert resolve_obj_by_qualname(name) is cls


def test_cuda_gets_the_v1_runner(
    on: Callable[[str], None], random_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = asked(random_models)
    on("cuda")
    devices.fill_in(args)
    assert os.environ[devices.V2_RUNNER] == "0"
    monkeypatch.setenv(devices.V2_RUNNER, "1")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=1 contradicts draft trees"):
        devices.fill_in(args)


def test_cpu_leaves_the_runner_and_graphs_alone(on: Callable[[str], None], random_models: dict[str, Path]) -> None:
    args = asked(random_models)
    on("cpu")
    devices.fill_in(args)
    assert devices.V2_RUNNER not in os.environ
    assert args.compilation_config.cudagraph_mode is None


@pytest.mark.parametrize("mode", [None, CUDAGraphMode.NONE, CUDAGraphMode.FULL])
def test_cuda_graphs_are_piecewise_unless_the_user_says_otherwise(
    mode: CUDAGraphMode | None, on: Callable[[str], None], random_models: dict[str, Path]
) -> None:
    """What users say is left to the rule in support.py, which refuses whole graphs (test_matrix.py)."""
    given = CompilationConfig(cudagraph_mode=mode)
    args = asked(random_models, compilation_config=given)
    on("cuda")
    devices.fill_in(args)
    assert args.compilation_config.cudagraph_mode == (CUDAGraphMode.PIECEWISE if mode is None else mode)
    assert given.cudagraph_mode == mode


def test_the_worker_refuses_the_v2_runner(random_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = asked(random_models).create_engine_config()
    EagleTreeWorker.check(config)
    monkeypatch.setenv(devices.V2_RUNNER, "1")
    for worker in (EagleTreeCPUWorker, EagleTreeGPUWorker):
        with pytest.raises(ValueError, match="vLLM's V2 model runner knows no trees; set VLLM_USE_V2_MODEL_RUNNER=0"):
            worker(config, 0, 0, "")


CLASSES = [
    (EagleTreeCPUModelRunner, EagleTreeRunner, CPUModelRunner),
    (EagleTreeGPUModelRunner, EagleTreeRunner, GPUModelRunner),
    (EagleTreeCPUWorker, EagleTreeWorker, CPUWorker),
    (EagleTreeGPUWorker, EagleTreeWorker, Worker),
]


@pytest.mark.parametrize(("cls", "mixin", "base"), CLASSES, ids=lambda x: x.__name__)
def test_ours_come_before_vllms(cls: type, mixin: type, base: type) -> None:
    order = cls.__mro__
    assert order.index(mixin) < order.index(base)
    ours = [c for c in order if c.__module__.startswith("vllm_eagle.")]
    assert list(order[: len(ours)]) == ours


@pytest.mark.parametrize(("cls", "base"), [(cls, base) for cls, _, base in CLASSES], ids=lambda x: x.__name__)
def test_overrides_take_what_vllm_passes(cls: type, base: type) -> None:
    """Every parameter of vLLM's method, by position and by name, or anything."""
    overridden = 0
    for ours in (c for c in cls.__mro__ if c.__module__.startswith("vllm_eagle.")):
        for name, method in vars(ours).items():
            if not inspect.isfunction(method) or not hasattr(base, name):
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
    assert overridden >= 4


def test_cudas_worker_compiles_before_vllm_watches_for_compilations(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's monitor fails whatever is compiled after it, or logs it as something that a request waited for."""
    order: list[str] = []
    worker = EagleTreeGPUWorker.__new__(EagleTreeGPUWorker)
    worker.model_config, worker.parallel_config = SimpleNamespace(seed=0), SimpleNamespace(data_parallel_index=0)
    worker.model_runner = SimpleNamespace(
        warm_up_kernels=lambda: order.append("compile"), measure_costs=lambda: order.append("measure")
    )
    monkeypatch.setattr(Worker, "_maybe_activate_jit_monitor", lambda self: order.append("monitor"))
    worker._maybe_activate_jit_monitor()
    assert order == ["compile", "measure", "monitor"]
    assert EagleTreeGPUWorker.compile_or_warm_up_model is Worker.compile_or_warm_up_model
    source = inspect.getsource(getattr(Worker, "_compile_or_warm_up_model", Worker.compile_or_warm_up_model))  # 0.33 or 0.32
    assert source.index("capture_model()") < source.index("self._maybe_activate_jit_monitor()")


def test_doctor_says_what_to_run_first_on_a_gpu(on: Callable[[str], None]) -> None:
    on("cuda")
    (detail,) = [detail for _, what, detail in doctor._findings() if what == "device"]
    assert "first run: vllm-eagle gpu-check" in detail


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton: pip install --no-deps -r vllm_eagle/locks/interop.lock")
def test_what_cudas_attention_overrides_is_as_expected() -> None:
    assert list(seams._changed(seams._cuda_seams())) == []


def test_the_runner_of_a_finished_cpu_worker_can_change_its_class() -> None:
    """CPUWorker builds its runner in place."""
    runner = CPUModelRunner.__new__(CPUModelRunner)
    runner.__class__ = EagleTreeCPUModelRunner
    assert isinstance(runner, EagleTreeRunner)


def test_cudas_worker_leaves_torch_alone() -> None:
    """Importing vLLM's CPU worker replaces streams, events and copies of torch by stand-ins."""
    code = (
        "import sys, vllm_eagle.engine.v1.gpu_worker\n"
        "assert not [name for name in sys.modules if name.startswith(('vllm.v1.worker.cpu.', 'vllm.v1.worker.cpu_worker'))]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_cpu_has_the_interface_of_attention() -> None:
    assert issubclass(TreeCPUAttentionImpl, TreeAttention)


class GPURunnerOnCPU(EagleTreeGPUModelRunner, CPUModelRunner):
    """The GPU's runner on top of vLLM's CPU runner, to run what it overrides."""


def test_profiling_holds_the_logits_of_all_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four requests of 17 nodes would be 68, but a step holds 64 tokens."""
    monkeypatch.setattr(gpu_runner, "BACKLOG_BYTES", 1 << 10)
    rows = []
    with engine(TARGET, max_num_seqs=4, max_num_batched_tokens=64, **trees(HEAD, 16)) as llm:
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        runner.__class__ = GPURunnerOnCPU
        compute_logits = runner.model.compute_logits
        monkeypatch.setattr(runner.model, "compute_logits", lambda hidden: [rows.append(len(hidden)), compute_logits(hidden)][1])
        hidden_states = torch.zeros(4, runner.model_config.get_hidden_size())
        assert runner._dummy_sampler_run(hidden_states).sampled_token_ids.shape == (17, 1)
    assert rows == [64, 17]  # the sampler is given the nodes of one tree at once, or a row of each request


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton: pip install --no-deps -r vllm_eagle/locks/interop.lock")
def test_compaction_on_a_gpu_moves_what_the_cpus_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch itself is compared with the reference that stands in for it here: test_ops.py."""
    from vllm_eagle.ops import move_slots

    cache = torch.randn(12, 2, 16, 8)
    expected = cache.clone()
    table = torch.randperm(12)[:9].reshape(3, 3).int()
    runner = GPURunnerOnCPU.__new__(GPURunnerOnCPU)
    runner.device = torch.device("cpu")
    block_table = SimpleNamespace(get_device_tensor=lambda num_reqs: table[:num_reqs])
    runner.input_batch = SimpleNamespace(num_reqs=3, block_table=[block_table])
    runner._caches = [(0, cache)]
    monkeypatch.setattr(move_slots, "move_accepted", lambda cache, *where: move_slots.reference([cache], *where))
    trees = [DraftTree(np.arange(6), np.array([0, 0, 0, 1, 2, 4]), np.zeros(6, dtype=np.float32))] * 2
    batch = lay_out(trees, [0, 2], [0, 9], [13, 20])
    paths = [[2, 4, 5], [1, 3]]
    runner._move_accepted(batch, paths)
    index, sources, targets = compact.moves(paths, [13, 20])
    before, after = (compact.slots(table.numpy(), batch.req_indices[index], x, 16) for x in (sources, targets))
    expected[after // 16, :, after % 16] = expected[before // 16, :, before % 16]
    assert torch.equal(cache, expected)


def test_layers_are_compacted_with_those_alike() -> None:
    """A group of the cache may hold layers of several shapes, some of which share one cache; the head's is left out."""
    caches = {"a": torch.zeros(4, 2, 16, 8), "b": torch.zeros(4, 2, 16, 8), "c": torch.zeros(4, 1, 16, 8), "head": torch.zeros(4)}
    caches["a again"] = caches["a"]
    runner = GPURunnerOnCPU.__new__(GPURunnerOnCPU)
    layers = {name: SimpleNamespace(kv_cache=cache) for name, cache in caches.items()}
    runner.compilation_config = SimpleNamespace(static_forward_context=layers)
    runner.kv_cache_config = SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=list(caches))])
    runner.drafter = SimpleNamespace(_draft_attn_layer_names={"head"})
    found = [(gid, [layer.kv_cache.data_ptr() for layer in alike]) for gid, alike in runner._target_layers()]
    assert found == [(0, [caches["a"].data_ptr(), caches["b"].data_ptr()]), (0, [caches["c"].data_ptr()])]


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

    def keep(self, token_ids: torch.Tensor, features: torch.Tensor, parts: dict[str, tuple[int, range]]) -> None:
        assert features.device.type == "meta"
        assert parts == {"c": (7, range(4, 6))}

    def take(self, req_id: str) -> Piece | None:
        return Piece(2, on_meta(5), on_meta(5, 8, dtype=torch.float32)) if req_id == "b" else None


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
