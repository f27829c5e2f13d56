"""The matrix is what is tested and what is refused."""

import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.interface import DeviceCapability
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.engine.engines import ENGINE, trees
from vllm_eagle.cli import main
from vllm_eagle.commands import matrix
from vllm_eagle.engine import rules, support
from vllm_eagle.pair import REAL_HEAD

ON_CUDA: dict[str, object] = {"device_config.device_type": "cuda"}
LATENT: dict[str, object] = {"model_config.use_mla": True, "model_config.architectures": ["DeepseekV3ForCausalLM"]}
# A change to the configuration that breaks each rule.
BREAKS: dict[str, dict[str, object]] = {
    "speculative methods other than EAGLE": {"speculative_config.method": "medusa"},
    "MTP modules other than those of MiMo, GLM-4 MoE, Ernie 4.5, EXAONE MoE and HY 3": {"speculative_config.method": "mtp"},
    "parallel drafting": {"speculative_config.parallel_drafting": True},
    "heterogeneous vocabularies": {"speculative_config.use_heterogeneous_vocab": True},
    "padded drafter batch": {"speculative_config.disable_padded_drafter_batch": False},
    "rejection_sample_method, draft_sample_method": {"speculative_config.draft_sample_method": "probabilistic"},
    "MLA, on CPUs": LATENT,
    "MLA other than that of DeepSeek-V2 and V3 and of Kimi K2": {"model_config.use_mla": True},
    "MLA with another CUDA attention backend than TRITON_MLA": ON_CUDA
    | LATENT
    | {"attention_config.backend": AttentionBackendEnum.FLASHMLA},
    "quantized KV cache with MLA, on CUDA": ON_CUDA | LATENT | {"cache_config.cache_dtype": "fp8"},
    "Mamba, linear attention, hybrids": {"model_config.is_hybrid": True},
    "encoder-decoder": {"model_config.is_encoder_decoder": True},
    "ALiBi": {"model_config.uses_alibi": True},
    "multimodal models other than Qwen2-VL, Qwen2.5-VL, Qwen3-VL": {"model_config.is_multimodal_model": True},
    "chunked attention (Llama 4) over more than one chunk": {"model_config.attention_chunk_size": 64},
    "pruned videos": {"model_config.multimodal_config": SimpleNamespace(is_multimodal_pruning_enabled=lambda: True)},
    "heads that do not fit the target": {"model_config.get_hidden_size": lambda: 96},
    "draft vocabularies of another target": {"speculative_config.draft_model_config.model": str(REAL_HEAD)},
    "EAGLE-3 heads for classes that hand out no features and are not listened to": {
        "speculative_config.method": "eagle3",
        "model_config.architectures": ["Ernie4_5_MoeForCausalLM"],
    },
    "devices other than CPU and CUDA": {"device_config.device_type": "xpu"},
    "vLLM's V2 model runner on CPUs, its V1 runner on CUDA": {"use_v2_model_runner": True},
    "CUDA attention backends other than FLASH_ATTN, TRITON_ATTN, CUSTOM": {
        "device_config.device_type": "cuda",
        "attention_config.backend": AttentionBackendEnum.FLASHINFER,
    },
    "prompts as embeddings": {"model_config.enable_prompt_embeds": True},
    "pipeline parallelism": {"parallel_config.pipeline_parallel_size": 2},
    "data parallelism": {"parallel_config.data_parallel_size": 2},
    "decode context parallelism": {"parallel_config.decode_context_parallel_size": 2},
    "dual batch overlap": {"parallel_config.use_ubatching": True},
    "KV connectors, disaggregated prefill": {"kv_transfer_config": object()},
    "async scheduling on CPUs": {"scheduler_config.async_scheduling": True},
    "quantized KV cache (fp8, int8, ...) on CPUs": {"cache_config.cache_dtype": "fp8"},
    "sampling masks, on CUDA": ON_CUDA | {"model_config.return_sampling_mask": True},
    "trace replay, on CUDA": ON_CUDA | {"model_config.enable_trace_replay": True},
    "watermarking, on CUDA": ON_CUDA | {"watermark_config": object()},
    "batch-sharded sampling, on CUDA": ON_CUDA | {"parallel_config.enable_batch_sharded_sampling": True},
    "prefill context parallelism, on CUDA": ON_CUDA | {"parallel_config.prefill_context_parallel_size": 2},
    "fast prefill with shared KV caches, on CUDA": ON_CUDA | {"cache_config.kv_sharing_fast_prefill": True},
    "routed experts in outputs, on CUDA": ON_CUDA | {"aux_output_config.enabled": True},
    "vLLM's adaptive verification, on CUDA": ON_CUDA | {"speculative_config.enable_adaptive_verification": True},
    "draft_window with other attention than TRITON_ATTN, on CUDA": ON_CUDA
    | {"additional_config": {"vllm_eagle": {"draft_window": 64}}, "attention_config.backend": AttentionBackendEnum.FLASH_ATTN},
    "trees that fit no step or no context": {"scheduler_config.max_num_batched_tokens": 16},
}


class Changed:
    """A configuration that differs in some places, given by dotted names."""

    def __init__(self, original: Any, changes: dict[str, object]):
        self._original, self._changes = original, changes

    def __getattr__(self, name: str) -> Any:
        if name in self._changes:
            return self._changes[name]
        inner = {key.removeprefix(f"{name}."): value for key, value in self._changes.items() if key.startswith(f"{name}.")}
        found = getattr(self._original, name)
        return Changed(found, inner) if inner else found


@pytest.fixture(scope="module")
def config(random_models: dict[str, Path]) -> Any:
    found = EngineArgs(model=str(random_models["target"]), **(ENGINE | trees(random_models["eagle"]))).create_engine_config()
    assert support.unsupported_reasons(found) == []
    return found


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.feature)
def test_every_rule_refuses_what_breaks_it_and_nothing_else(rule: rules.Rule, config: Any) -> None:
    assert rule.check(config) is None
    changed = Changed(config, BREAKS[rule.feature])
    reason = rule.check(changed)  # type: ignore[arg-type]
    assert reason
    with pytest.raises(ValueError, match="cannot run draft trees here") as refused:
        support.check_supported(changed)  # type: ignore[arg-type]
    assert reason in str(refused.value)


ON_CPUS = [rule for rule in rules.RULES if rule.feature.endswith("on CPUs")]


@pytest.mark.parametrize("rule", ON_CPUS, ids=lambda rule: rule.feature)
def test_what_the_cpus_kernel_cannot_do_is_left_to_the_layers_elsewhere(rule: rules.Rule, config: Any) -> None:
    changed = Changed(config, BREAKS[rule.feature] | {"device_config.device_type": "cuda"})
    assert rule.check(changed) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", [rule for rule in rules.RULES if rule.feature.endswith("on CUDA")], ids=lambda rule: rule.feature)
def test_what_only_cudas_engine_cannot_do_runs_on_cpus(rule: rules.Rule, config: Any) -> None:
    if rule.feature.startswith("vLLM's V2 model runner"):
        on_cuda = Changed(config, ON_CUDA | {"use_v2_model_runner": True})
        assert rule.check(on_cuda) is None  # type: ignore[arg-type]
        reason = rule.check(Changed(config, ON_CUDA))  # type: ignore[arg-type]
        assert (
            reason
            == "vLLM's V1 model runner has no trees on CUDA, and it was chosen because of: VLLM_USE_V2_MODEL_RUNNER=0; remove that"
        )
    else:
        assert rule.check(Changed(config, BREAKS[rule.feature] | {"device_config.device_type": "cpu"})) is None  # type: ignore[arg-type]


def test_no_rule_is_forgotten_here() -> None:
    assert BREAKS.keys() == {rule.feature for rule in rules.RULES}


needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs triton: pip install --no-deps -r vllm_eagle/locks/interop.lock"
)


@needs_triton
@pytest.mark.parametrize(
    ("changes", "capability", "chosen"),
    [
        ({}, (9, 0), "FLASH_ATTN"),
        ({}, (7, 5), "TRITON_ATTN"),
        ({"model_config.dtype": torch.float32}, (9, 0), "TRITON_ATTN"),
        ({"cache_config.cache_dtype": "fp8"}, (9, 0), "TRITON_ATTN"),
        ({"model_config.get_sliding_window": lambda: 64}, (9, 0), "TRITON_ATTN"),
        ({"model_config.get_sliding_window": lambda: 1 << 20}, (9, 0), "FLASH_ATTN"),
        ({"speculative_config.draft_model_config.get_sliding_window": lambda: 64}, (9, 0), "TRITON_ATTN"),
        ({"additional_config": {"vllm_eagle": {"draft_window": 64}}}, (9, 0), "TRITON_ATTN"),
        ({"additional_config": {"vllm_eagle": {"draft_window": 1 << 20}}}, (9, 0), "FLASH_ATTN"),
        ({"model_config.hf_text_config.attn_logit_softcapping": 50.0}, (9, 0), "FLASH_ATTN"),
        ({"model_config.get_head_size": lambda: 256}, (9, 0), "FLASH_ATTN"),
        ({"model_config.get_head_size": lambda: 256}, (10, 0), "TRITON_ATTN"),
        ({"speculative_config.draft_model_config.get_head_size": lambda: 256}, (10, 0), "TRITON_ATTN"),
    ],
)
def test_the_backend_that_is_chosen_takes_the_layers(
    changes: dict[str, object], capability: tuple[int, int], chosen: str, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be refused when layers are loaded (`not_supported_reasons`) is never chosen by itself."""
    from vllm.v1.attention.backends import fa_utils

    from vllm_eagle.attention import cuda

    platform = SimpleNamespace(get_device_capability=lambda: DeviceCapability(*capability))
    for module in (cuda, fa_utils):
        monkeypatch.setattr(module, "current_platform", platform)
    half = {"model_config.dtype": torch.bfloat16, "speculative_config.draft_model_config.dtype": torch.bfloat16}
    assert cuda.default_backend(Changed(config, half | changes)).name == chosen  # type: ignore[arg-type]


@needs_triton
@pytest.mark.parametrize(("is_latent", "chosen"), [(True, ("TRITON_MLA", "FLASH_ATTN")), (False, ("FLASH_ATTN", "FLASH_ATTN"))])
def test_latents_have_a_backend_of_their_own(
    is_latent: bool, chosen: tuple[str, str], monkeypatch: pytest.MonkeyPatch, random_models: dict[str, Path]
) -> None:
    """The head beside them has one that takes its layers."""
    from vllm_eagle.attention import cuda

    config = EngineArgs(model=str(random_models["target"]), **(ENGINE | trees(random_models["eagle"]))).create_engine_config()
    registered: dict[str, str] = {}
    monkeypatch.setattr(cuda, "register_backend", lambda backend, path: registered.update({backend.name: path}))
    platform = SimpleNamespace(get_device_capability=lambda: DeviceCapability(9, 0))
    monkeypatch.setattr(cuda, "current_platform", platform)
    target, head = config.model_config, config.speculative_config.draft_model_config
    target.dtype = head.dtype = torch.bfloat16
    monkeypatch.setattr(type(target), "use_mla", property(lambda self: is_latent and self is target))
    cuda.register(config)
    assert (config.attention_config.backend.name, config.speculative_config.attention_backend.name) == chosen
    assert {resolve_obj_by_qualname(path).get_name() for path in registered.values()} == registered.keys()


def test_what_works_names_a_test_that_exists() -> None:
    for feature, _, test in matrix.WORKS:
        assert any(Path(__file__).parents[1].rglob(f"{test}.py")), feature


def test_the_command_prints_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--matrix"]) == 0
    printed = capsys.readouterr().out
    cells = [[cell for cell in re.split(r"  +", line) if cell] for line in printed.splitlines()]
    for row in matrix.rows():
        assert [cell for cell in row if cell] in cells
