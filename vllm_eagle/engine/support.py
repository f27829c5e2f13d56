"""What tree mode supports, checked before a model is loaded; everything else is refused with its reason and a way out.

Rules for targets are in target_rules.py. `vllm-eagle doctor --matrix` lists the same rules (matrix.py).
"""

from collections.abc import Callable
from pathlib import Path

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import supports_eagle3

from vllm_eagle.algorithm.config import CONFIG_KEY, TreeConfig
from vllm_eagle.attention.interface import CUDA_BACKENDS, LATENT_BACKEND, window_is_asked
from vllm_eagle.engine import target_rules  # noqa: F401  it adds its rules
from vllm_eagle.engine.draft_vocab import named_tokens
from vllm_eagle.engine.features import HANDED_ON, LISTENED
from vllm_eagle.engine.loaded import MTP_MODULES
from vllm_eagle.engine.rules import PLAIN, RULES, engine_of, on_cpu, refused
from vllm_eagle.heads.check import misfits
from vllm_eagle.heads.draft_vocab import FILE
from vllm_eagle.heads.formats import REPLAYED_ARCHITECTURES, read_head
from vllm_eagle.heads.target import Target
from vllm_eagle.options import devices
from vllm_eagle.options.engine_args import MTP

logger = init_logger(f"vllm.{__name__}")  # below "vllm", so that vLLM shows it with its own lines


def unsupported_reasons(vllm_config: VllmConfig) -> list[str]:
    """Why this configuration cannot run with draft trees; empty if it can."""
    if vllm_config.speculative_config is None:
        return ["no draft head is configured; set --speculative-model (spec_model) to an EAGLE head"]
    return [reason for rule in RULES if (reason := rule.check(vllm_config)) is not None]


def check_supported(vllm_config: VllmConfig) -> None:
    """Raise one error that names everything that does not fit.

    Raises:
        ValueError: options, model, head or engine mode are not supported.
    """
    spec = vllm_config.speculative_config
    if spec is not None and spec.num_speculative_tokens:
        TreeConfig.from_options(spec.num_speculative_tokens, vllm_config.additional_config.get(CONFIG_KEY, {}))
    reasons = unsupported_reasons(vllm_config)
    if reasons:
        raise ValueError("vllm_eagle cannot run draft trees here:\n  " + "\n  ".join(reasons))


# The method


@refused("speculative methods other than EAGLE", "only EAGLE heads draft trees; other methods run in vLLM as without the plugin")
def _method(config: VllmConfig) -> str | None:
    method = config.speculative_config.method
    if method in ("eagle", "eagle3", MTP):
        return None
    return f'speculative method "{method}" has no tree; use an EAGLE head with method "eagle" or "eagle3"'


@refused(
    "MTP modules other than those of MiMo, GLM-4 MoE, Ernie 4.5, EXAONE MoE and HY 3",
    "recurrent, with latent attention, another one for each depth, or not tried",
)
def _module(config: VllmConfig) -> str | None:
    if config.speculative_config.method != MTP:
        return None
    found = config.speculative_config.draft_model_config.hf_config.architectures[0]
    if found in MTP_MODULES:
        return None
    return f"{config.model_config.model}: its MTP module, {found}, has no tree here; use an EAGLE head, or {PLAIN}"


@refused("parallel drafting", "a head that drafts all positions at once has no tree to grow")
def _parallel_drafting(config: VllmConfig) -> str | None:
    return "speculative_config.parallel_drafting drafts no tree; remove it" if config.speculative_config.parallel_drafting else None


@refused("heterogeneous vocabularies", "tokens of head and target are compared by id")
def _vocabularies(config: VllmConfig) -> str | None:
    if not config.speculative_config.use_heterogeneous_vocab:
        return None
    return "speculative_config.use_heterogeneous_vocab is not supported with trees; use a head with the target's vocabulary"


@refused("padded drafter batch", "trees differ in size; the option is set by itself, to true on CPUs and to false on CUDA")
def _padded(config: VllmConfig) -> str | None:
    wanted = engine_of(config).disable_padded_drafter_batch
    if config.speculative_config.disable_padded_drafter_batch == wanted:
        return None
    return f"speculative_config.disable_padded_drafter_batch must be {str(wanted).lower()} in tree mode here; set it"


@refused("rejection_sample_method, draft_sample_method", "trees are not verified by rejection: the target's own samples decide")
def _rejection(config: VllmConfig) -> str | None:
    spec = config.speculative_config
    for name, default in (("rejection_sample_method", "standard"), ("draft_sample_method", "greedy")):
        if getattr(spec, name) != default:
            return f'speculative_config.{name}="{getattr(spec, name)}" would change nothing with trees; remove it'
    return None


# The head


@refused("heads that do not fit the target", "size, vocabulary or layers; `vllm-eagle inspect HEAD --target MODEL` says the same")
def _head(config: VllmConfig) -> str | None:
    """Asked again here, of the target as vLLM has read it: options may have changed what its folder says."""
    draft, model = config.speculative_config.draft_model_config, config.model_config
    if config.speculative_config.method == MTP or draft is None or not Path(draft.model).is_dir():
        return None
    if draft.architectures[0] in REPLAYED_ARCHITECTURES:
        return None
    target = Target(
        path=Path(model.model),
        architectures=tuple(model.architectures),
        hidden_size=model.get_hidden_size(),
        vocab_size=model.get_vocab_size(),
        num_layers=model.get_total_num_hidden_layers(),
        max_positions=model.max_model_len,
    )
    head = read_head(Path(draft.model))
    reasons = misfits(head, target)
    if reasons:
        return f"head: {draft.model} does not fit {model.model}: {reasons[0]}"
    if head.kind == "EAGLE-3" and head.aux_layers is None:
        logger.warning("The head does not name the target layers it was trained on; vLLM assumes %s.", target.default_aux_layers)
    return None


@refused("EAGLE-3 heads for classes that hand out no features and are not listened to", "the head reads features of the layers")
def _features(config: VllmConfig) -> str | None:
    """Asked of the class, so that nobody waits for a model to be loaded first. Some without the interface are listened to."""
    model = config.model_config
    if config.speculative_config.method != "eagle3":
        return None
    model_class, _ = model.registry.resolve_model_cls(model.architectures, model)
    listened = model_class.__name__ in (*LISTENED, *HANDED_ON) and not config.use_v2_model_runner  # by the V1 runner
    if supports_eagle3(model_class) or listened:
        return None
    return (
        f"model: {model.model} is a {model_class.__name__}, of whose layers vLLM hands no features to an EAGLE-3 head; "
        f"take an EAGLE-1 head, or {PLAIN}"
    )


@refused("draft vocabularies of another target", "drafting takes rows of the target's LM head")
def _draft_vocabulary(config: VllmConfig) -> str | None:
    spec, options = config.speculative_config, config.additional_config.get(CONFIG_KEY, {})
    if spec.draft_model_config is None or not options.get("draft_vocab", True):
        return None
    try:
        named_tokens(config)
    except ValueError as error:
        return (
            f"head: {spec.draft_model_config.model}/{FILE}: {error}; remove the file, make it anew with `vllm-eagle draft-vocab`, "
            "or set draft_vocab to false"
        )
    return None


# The engine


@refused("devices other than CPU and CUDA", "there are tree kernels for these two")
def _device(config: VllmConfig) -> str | None:
    device = config.device_config.device_type
    return None if device in ("cpu", "cuda") else f"device {device}: there are tree kernels for CPU and CUDA only; {PLAIN}"


@refused("vLLM's V2 model runner on CPUs, its V1 runner on CUDA", "trees are built into the other one; it is chosen by itself")
def _model_runner(config: VllmConfig) -> str | None:
    ours = engine_of(config)
    if config.use_v2_model_runner == ours.is_v2:
        return None
    if not ours.is_v2:
        return f"vLLM's V2 model runner has no trees on {ours.device}; set {devices.V2_RUNNER}=0 before the process starts"
    missing = ", ".join(config._get_v2_model_runner_unsupported_features()) or f"{devices.V2_RUNNER}=0"
    return f"vLLM's V1 model runner has no trees on {ours.device}, and it was chosen because of: {missing}; remove that"


@refused(f"CUDA attention backends other than {', '.join(CUDA_BACKENDS)}", "these have tree rows; one is chosen by itself")
def _attention_backend(config: VllmConfig) -> str | None:
    if config.device_config.device_type != "cuda":
        return None
    per_kind = config.attention_config.backend_per_kind
    chosen = {
        "attention_backend": None if config.model_config.use_mla else config.attention_config.backend,
        "speculative_config.attention_backend": config.speculative_config.attention_backend,
        **{f"attention_config.backend_per_kind.{kind}": backend for kind, backend in per_kind.items()},
    }
    wrong = [f"{name}={x.name}" for name, x in chosen.items() if x is not None and x.name not in CUDA_BACKENDS]
    return f"{', '.join(wrong)}: no tree rows there; set it to {' or '.join(CUDA_BACKENDS[:2])}" if wrong else None


@refused(f"MLA with another CUDA attention backend than {LATENT_BACKEND}", "this has tree rows; it is chosen by itself")
def _latent_backend(config: VllmConfig) -> str | None:
    chosen = config.attention_config.backend
    if config.device_config.device_type != "cuda" or not config.model_config.use_mla or chosen is None:
        return None
    return (
        None
        if chosen.name == LATENT_BACKEND
        else f"attention_backend={chosen.name}: no tree rows there; set it to {LATENT_BACKEND}"
    )


def _engine_rule(feature: str, why: str, applies: Callable[[VllmConfig], bool], text: str) -> None:
    refused(feature, why)(lambda config: text if applies(config) else None)


_engine_rule(
    "prompts as embeddings", "the head reads tokens", lambda c: c.model_config.enable_prompt_embeds,
    "enable_prompt_embeds: the head reads tokens, which such prompts have none of; remove it",
)  # fmt: skip
_engine_rule(
    "pipeline parallelism", "trees stay on the last stage", lambda c: c.parallel_config.pipeline_parallel_size > 1,
    "pipeline_parallel_size > 1: trees stay on the last stage; set it to 1",
)  # fmt: skip
_engine_rule(
    "data parallelism", "ranks may draft to different depths", lambda c: c.parallel_config.data_parallel_size > 1,
    "data_parallel_size > 1: ranks may draft to different depths; set it to 1 and run one server per replica",
)  # fmt: skip
_engine_rule(
    "decode context parallelism", "a context lies on several ranks", lambda c: c.parallel_config.decode_context_parallel_size > 1,
    "decode_context_parallel_size > 1 splits a context over ranks; set it to 1",
)  # fmt: skip
_engine_rule(
    "dual batch overlap", "a step's metadata comes in halves", lambda c: bool(c.parallel_config.use_ubatching),
    "enable_dbo (or ubatch_size) splits a step, and with it its trees; remove it",
)  # fmt: skip
_engine_rule(
    "KV connectors, disaggregated prefill", "they would send tree slots before compaction",
    lambda c: c.kv_transfer_config is not None,
    "kv_transfer_config: a connector would send keys and values before they are compacted; remove it",
)  # fmt: skip
_engine_rule(
    "async scheduling on CPUs", "a step is scheduled before the last tree is known",
    lambda c: not engine_of(c).is_v2 and bool(c.scheduler_config.async_scheduling),
    "async_scheduling schedules a step before the last tree is known; set async_scheduling to false",
)  # fmt: skip


# vLLM's V2 runner, on CUDA


def _v2_rule(feature: str, why: str, applies: Callable[[VllmConfig], bool], text: str) -> None:
    _engine_rule(f"{feature}, on CUDA", why, lambda config: engine_of(config).is_v2 and applies(config), text)


_v2_rule(
    "sampling masks", "they are made where vLLM verifies chains", lambda c: bool(c.model_config.return_sampling_mask),
    "return_sampling_mask: masks are made where vLLM verifies chains; remove it",
)  # fmt: skip
_v2_rule(
    "trace replay", "it overwrites one sampled token per request and step", lambda c: bool(c.model_config.enable_trace_replay),
    "enable_trace_replay overwrites one sampled token per request and step; remove it",
)  # fmt: skip
_v2_rule(
    "watermarking", "it draws other noise than trees are drafted with", lambda c: c.watermark_config is not None,
    "watermark_config: watermarks draw other noise than trees are drafted with; remove it",
)  # fmt: skip
_v2_rule(
    "batch-sharded sampling", "a rank does not know the others' accepted paths",
    lambda c: bool(c.parallel_config.enable_batch_sharded_sampling),
    "enable_batch_sharded_sampling: a rank would not know the others' accepted paths; remove it",
)  # fmt: skip
_v2_rule(
    "prefill context parallelism", "a prompt's rows lie on several ranks",
    lambda c: c.parallel_config.prefill_context_parallel_size > 1,
    "prefill_context_parallel_size > 1 splits a batch's rows over ranks; set it to 1",
)  # fmt: skip
_v2_rule(
    "fast prefill with shared KV caches", "it counts on a chain's rows", lambda c: bool(c.cache_config.kv_sharing_fast_prefill),
    "kv_sharing_fast_prefill counts on a chain's rows; remove it",
)  # fmt: skip
_v2_rule(
    "routed experts in outputs", "they would be those of nodes that were not accepted", lambda c: bool(c.aux_output_config.enabled),
    "enable_return_routed_experts would return those of nodes that were not accepted; remove it",
)  # fmt: skip
_v2_rule(
    "vLLM's adaptive verification", "trees have a budget of their own",
    lambda c: bool(c.speculative_config.enable_adaptive_verification),
    "speculative_config.enable_adaptive_verification is for chains, trees have a budget of their own; remove it",
)  # fmt: skip
_v2_rule(
    "quantized KV cache with MLA", "the tree kernel over latents does not read it",
    lambda c: c.model_config.use_mla and c.cache_config.cache_dtype not in ("auto", "bfloat16", "float16", "float32"),
    "kv_cache_dtype: with MLA the tree kernel reads no quantized cache; set kv_cache_dtype to auto",
)  # fmt: skip
_v2_rule(
    "draft_window with other attention than TRITON_ATTN", "the others would count it by row", lambda c: _wants_window(c),
    "draft_window: only TRITON_ATTN counts a window by position along a tree; set attention_backend to it, or draft_window to 0",
)  # fmt: skip


def _wants_window(config: VllmConfig) -> bool:
    """Whether a window over the head is asked for beside a backend that cannot have one; where none is chosen, one that can is."""
    if not window_is_asked(config):
        return False
    of_the_target = None if config.model_config.use_mla else config.attention_config.backend  # else it is not the head's
    chosen = (of_the_target, config.speculative_config.attention_backend)
    return any(backend is not None and backend.name != "TRITON_ATTN" for backend in chosen)


@refused("quantized KV cache (fp8, int8, ...) on CPUs", "the CPU tree kernel reads no quantized cache")
def _cache_dtype(config: VllmConfig) -> str | None:
    dtype = config.cache_config.cache_dtype
    if not on_cpu(config) or dtype in ("auto", "bfloat16", "float16", "float32"):
        return None
    return f"kv_cache_dtype {dtype}: the CPU tree kernel reads no quantized cache; set kv_cache_dtype to auto"


@refused("trees that fit no step or no context", "a tree is verified in one step")
def _size(config: VllmConfig) -> str | None:
    nodes, most = config.speculative_config.num_speculative_tokens or 0, config.scheduler_config.max_num_batched_tokens
    if nodes + 1 > most:
        return (
            f"a tree of num_speculative_tokens={nodes} nodes and its root need {nodes + 1} slots in a step, "
            f"max_num_batched_tokens is {most}; lower the one or raise the other"
        )
    if nodes + 1 >= config.model_config.max_model_len:
        return (
            f"a tree of num_speculative_tokens={nodes} nodes does not fit max_model_len={config.model_config.max_model_len}; "
            "lower num_speculative_tokens"
        )
    return None
