"""Which targets have no draft trees, and why."""

from collections.abc import Callable

from vllm.config import VllmConfig

from vllm_eagle.engine.rules import PLAIN, engine_of, on_cpu, refused

# Classes of vLLM that see pictures, with causal attention over them.
SEEING = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
)
# Classes of vLLM with latent attention over all of the context; Kimi K2's is DeepSeek's.
LATENT = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")


def _model_rule(feature: str, why: str, applies: Callable[[VllmConfig], bool], text: str) -> None:
    def check(config: VllmConfig) -> str | None:
        return f"model: {config.model_config.model} {text}; {PLAIN}" if applies(config) else None

    refused(feature, why)(check)


_model_rule(
    "MLA, on CPUs", "vLLM has no cache there for a head beside it",
    lambda c: c.model_config.use_mla and not engine_of(c).is_v2,
    "uses multi-head latent attention (MLA), which has trees on CUDA only",
)  # fmt: skip
_model_rule(
    "MLA other than that of DeepSeek-V2 and V3 and of Kimi K2", "sparse, beside a recurrent state, or not tried",
    lambda c: c.model_config.use_mla and (not set(c.model_config.architectures) <= set(LATENT) or _is_sparse(c)),
    f"has latent attention (MLA) that is sparse or was not tried; with trees that of these is served: {', '.join(LATENT)}",
)  # fmt: skip
_model_rule(
    "Mamba, linear attention, hybrids", "a recurrent state cannot branch",
    lambda c: _is_recurrent(c),
    "keeps a recurrent state (Mamba or linear attention), which cannot branch",
)  # fmt: skip
_model_rule(
    "encoder-decoder", "heads are trained on decoders", lambda c: c.model_config.is_encoder_decoder, "is an encoder-decoder"
)
_model_rule(
    "ALiBi", "its bias goes by cache slot", lambda c: c.model_config.uses_alibi, "uses ALiBi, whose bias goes by cache slot"
)
_model_rule(
    "multimodal models other than Qwen2-VL, Qwen2.5-VL, Qwen3-VL", "not tried, or rows of a picture see those behind them",
    lambda c: _is_other_multimodal(c),
    f"is multimodal, and with trees these are served: {', '.join(SEEING)}",
)  # fmt: skip


@refused(
    "chunked attention (Llama 4) over more than one chunk",
    "vLLM cuts contexts by cache slot, nodes go by depth; on CUDA: not tried",
)
def _chunks(config: VllmConfig) -> str | None:
    """In the first chunk it is full attention."""
    chunk, longest = config.model_config.attention_chunk_size, config.model_config.max_model_len
    if chunk is None or (longest <= chunk and on_cpu(config)):
        return None
    if not on_cpu(config):
        return f"model: {config.model_config.model} has chunked attention, which trees have on CPUs only; {PLAIN}"
    return (
        f"model: {config.model_config.model} attends to chunks of {chunk} tokens, which vLLM cuts by cache slot while nodes go by "
        f"depth; set max_model_len, now {longest}, to {chunk}, or {PLAIN}"
    )


@refused("pruned videos", "vLLM then works positions out anew, by row")
def _pruned_videos(config: VllmConfig) -> str | None:
    settings = config.model_config.multimodal_config
    if settings is None or not settings.is_multimodal_pruning_enabled():
        return None
    return "video_pruning_rate: vLLM works positions out anew for it, by row instead of by depth; remove it"


def _is_other_multimodal(config: VllmConfig) -> bool:
    return config.model_config.is_multimodal_model and not set(config.model_config.architectures) & set(SEEING)


def _is_sparse(config: VllmConfig) -> bool:
    """As DeepSeek-V3.2, in which each row chooses what it sees."""
    return getattr(config.model_config.hf_text_config, "index_topk", None) is not None


def _is_recurrent(config: VllmConfig) -> bool:
    """As vLLM says of the model's class, or as the model says of its layers: vLLM may run it by another class."""
    model = config.model_config
    kinds = [str(kind) for kind in getattr(model.hf_text_config, "layer_types", None) or []]
    by_layers = any(kind == "linear_attention" or not kind.endswith("attention") for kind in kinds)
    return bool(model.is_hybrid or model.is_attention_free or by_layers)
