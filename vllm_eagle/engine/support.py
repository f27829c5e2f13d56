"""What tree mode supports, checked before a model is loaded; everything else is refused with its reason and a way out."""

from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_eagle.config import CONFIG_KEY, TreeConfig

logger = init_logger(__name__)

PLAIN = "remove the draft-tree options to serve without trees"


def unsupported_reasons(vllm_config: VllmConfig) -> list[str]:
    """Why this configuration cannot run with draft trees; empty if it can."""
    return [*_method_reasons(vllm_config), *_model_reasons(vllm_config), *_head_reasons(vllm_config), *_engine_reasons(vllm_config)]


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


def _method_reasons(vllm_config: VllmConfig) -> list[str]:
    spec = vllm_config.speculative_config
    if spec is None:
        return ["no draft head is configured; set speculative_config.model (or spec_model) to an EAGLE head"]
    if spec.method not in ("eagle", "eagle3"):
        return [f'speculative method "{spec.method}" has no tree; use an EAGLE head with method "eagle" or "eagle3"']
    reasons = []
    if spec.parallel_drafting:
        reasons.append("speculative_config.parallel_drafting drafts no tree; remove it")
    if spec.use_heterogeneous_vocab:
        reasons.append(
            "speculative_config.use_heterogeneous_vocab is not supported with trees; use a head with the target's vocabulary"
        )
    if not spec.disable_padded_drafter_batch:
        reasons.append("speculative_config.disable_padded_drafter_batch must be true in tree mode; set it")
    return reasons


def _model_reasons(vllm_config: VllmConfig) -> list[str]:
    model = vllm_config.model_config
    reasons = []
    if model.use_mla:
        reasons.append(f"model: {model.model} uses multi-head latent attention (MLA), which has no tree kernel here; {PLAIN}")
    if model.is_hybrid or model.is_attention_free:
        reasons.append(f"model: {model.model} keeps a recurrent state (Mamba or linear attention), which cannot branch; {PLAIN}")
    if model.is_encoder_decoder:
        reasons.append(f"model: {model.model} is an encoder-decoder; {PLAIN}")
    if model.uses_alibi:
        reasons.append(f"model: {model.model} uses ALiBi, whose bias goes by cache slot; {PLAIN}")
    if model.is_multimodal_model:
        reasons.append(f"model: {model.model} is multimodal, and the head sees text only; {PLAIN}")
    if model.uses_mrope:
        reasons.append(f"model: {model.model} uses M-RoPE positions; {PLAIN}")
    window = model.get_sliding_window()
    if window is not None and window < model.max_model_len:
        reasons.append(
            f"model: {model.model} has a sliding window of {window} tokens, which the CPU tree kernel does not know; "
            f"set max_model_len to at most {window}, or {PLAIN}"
        )
    if getattr(model.hf_text_config, "attn_logit_softcapping", None):
        reasons.append(f"model: {model.model} soft-caps attention scores, which the CPU tree kernel does not do; {PLAIN}")
    return reasons


def _head_reasons(vllm_config: VllmConfig) -> list[str]:
    spec = vllm_config.speculative_config
    if spec is None or spec.draft_model_config is None:
        return []
    target, head = vllm_config.model_config, spec.draft_model_config
    hf_config = head.hf_config
    expected = getattr(hf_config, "target_hidden_size", None) or head.get_hidden_size()
    reasons = []
    if expected != target.get_hidden_size():
        reasons.append(
            f"head: {head.model} takes features of size {expected}, {target.model} has hidden size {target.get_hidden_size()}; "
            "set speculative_config.model to a head trained for this target"
        )
    if head.get_vocab_size() != target.get_vocab_size():
        reasons.append(
            f"head: {head.model} has a vocabulary of {head.get_vocab_size()}, {target.model} one of {target.get_vocab_size()}; "
            "set speculative_config.model to a head trained for this target"
        )
    return [*reasons, *_aux_layer_reasons(vllm_config)]


def _aux_layer_reasons(vllm_config: VllmConfig) -> list[str]:
    """EAGLE-3: three different layers of the target must be named, or vLLM's guess must make sense."""
    spec = vllm_config.speculative_config
    hf_config = spec.draft_model_config.hf_config
    eagle_config = getattr(hf_config, "eagle_config", None) or {}
    if spec.method != "eagle3" or not eagle_config.get("use_aux_hidden_state", True):
        return []
    named = getattr(hf_config, "eagle_aux_hidden_state_layer_ids", None) or eagle_config.get("eagle_aux_hidden_state_layer_ids")
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    layers = list(named or (2, num_layers // 2, num_layers - 3))
    if len(set(layers)) == len(layers) and all(0 <= layer <= num_layers for layer in layers):
        if not named:
            logger.warning("The head does not name the target layers it was trained on; vLLM assumes %s.", layers)
        return []
    return [
        f"head: {spec.draft_model_config.model} would read layers {layers} of a target with {num_layers}; "
        "set eagle_aux_hidden_state_layer_ids in its config.json to the layers it was trained on"
    ]


def _engine_reasons(vllm_config: VllmConfig) -> list[str]:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    scheduler, spec = vllm_config.scheduler_config, vllm_config.speculative_config
    reasons = []
    if vllm_config.device_config.device_type != "cpu":
        reasons.append(f"device {vllm_config.device_config.device_type}: only the CPU backend exists so far; {PLAIN}")
    if parallel.pipeline_parallel_size > 1:
        reasons.append("pipeline_parallel_size > 1: trees stay on the last stage; set it to 1")
    if parallel.data_parallel_size > 1:
        reasons.append("data_parallel_size > 1: ranks may draft to different depths; set it to 1 and run one server per replica")
    if parallel.decode_context_parallel_size > 1:
        reasons.append("decode_context_parallel_size > 1 splits a context over ranks; set it to 1")
    if vllm_config.kv_transfer_config is not None:
        reasons.append("kv_transfer_config: a connector would send keys and values before they are compacted; remove it")
    if cache.cache_dtype not in ("auto", "bfloat16", "float16", "float32"):
        reasons.append(
            f"kv_cache_dtype {cache.cache_dtype}: the CPU tree kernel reads no quantized cache; set kv_cache_dtype to auto"
        )
    if scheduler.async_scheduling:
        reasons.append("async_scheduling schedules a step before the last tree is known; set async_scheduling to false")
    if spec is not None and spec.num_speculative_tokens:
        needed = spec.num_speculative_tokens + 1
        if needed > scheduler.max_num_batched_tokens:
            reasons.append(
                f"a tree of num_speculative_tokens={spec.num_speculative_tokens} nodes and its root need {needed} slots in a step, "
                f"max_num_batched_tokens is {scheduler.max_num_batched_tokens}; lower the one or raise the other"
            )
        if needed >= vllm_config.model_config.max_model_len:
            reasons.append(
                f"a tree of num_speculative_tokens={spec.num_speculative_tokens} nodes does not fit max_model_len="
                f"{vllm_config.model_config.max_model_len}; lower num_speculative_tokens"
            )
    return reasons
