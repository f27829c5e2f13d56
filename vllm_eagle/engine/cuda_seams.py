"""What we rely on in vLLM on CUDA alone; checked by seams.py. Triton is not installed beside the CPU wheel: imports wait."""

from collections.abc import Iterator
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu_worker import Worker

FORWARD = "layer query key value kv_cache attn_metadata output output_scale output_block_scale"
_LATENT_FORWARD = (
    "q k_c_normed k_pe kv_cache attn_metadata output output_scale output_block_scale quant_group_size quant_scale_ue8m0 "
    "quant_col_major quant_tma_aligned q_dcp_replicated"
)
BUILD = "common_prefix_len common_attn_metadata fast_build"


def of_attention() -> Iterator[tuple[Any, str, str, str]]:
    """Of its backends."""
    from vllm.model_executor.layers.attention import mla_attention
    from vllm.v1.attention.backends import fa_utils, flash_attn, registry, triton_attn, utils
    from vllm.v1.attention.backends.mla import triton_mla
    from vllm.v1.attention.ops import merge_attn_states

    yield registry, "register_backend", "class_path is_mamba", "attention/cuda.py"
    yield fa_utils, "uses_fa4_hd256_kernel", "head_size_v", "attention/cuda.py"
    for impl, builder, file in (
        (flash_attn.FlashAttentionImpl, flash_attn.FlashAttentionMetadataBuilder, "attention/flash.py"),
        (triton_attn.TritonAttentionImpl, triton_attn.TritonAttentionMetadataBuilder, "attention/cuda.py"),
    ):
        yield impl, "forward", FORWARD, file
        yield impl, "fused_output_quant_supported", "quant_key", "attention/cuda.py"
        yield builder, "build", BUILD, "attention/cuda.py"
        yield builder, "get_varlen_cudagraph_max_query_len", "kv_cache_spec", "attention/cuda.py"
    impl, builder, file = triton_mla.TritonMLAImpl, triton_mla.TritonMLAMetadataBuilder, "attention/mla.py"
    yield impl, "forward_mqa", "q kv_c_and_k_pe_cache attn_metadata layer", file
    yield builder, "__init__", "kv_cache_spec layer_names vllm_config device", file
    yield builder, "build", BUILD, file
    yield builder, "get_varlen_cudagraph_max_query_len", "kv_cache_spec", file
    yield mla_attention.MLAAttention, "forward_impl", _LATENT_FORWARD, file
    yield mla_attention.MLAAttention, "bind_kv_cache", "kv_cache", "engine/v2/runner.py"
    yield utils, "split_decodes_and_prefills", "decode_threshold require_uniform treat_short_extends_as_decodes", file
    yield (
        merge_attn_states,
        "merge_attn_states",
        "prefix_output prefix_lse suffix_output suffix_lse output_lse prefill_tokens_with_context output_scale",
        "attention/flash.py",
    )


def of_the_runner() -> Iterator[tuple[Any, str, str, str]]:
    """Of the V2 runner, its sampler, speculator and scheduler."""
    from vllm.v1 import outputs
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.worker.gpu import async_utils, attn_utils, block_table, cudagraph_utils, input_batch, model_runner
    from vllm.v1.worker.gpu.metrics import logits
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.sample import gumbel, logprob, sampler
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler, utils
    from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator
    from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import SpeculatorCudaGraphManager

    file = "engine/v2/worker.py"
    yield Worker, "__init__", "vllm_config local_rank rank distributed_init_method is_driver_worker", file
    yield Worker, "init_device", "", file
    yield Worker, "_make_model_runner", "", file
    yield Worker, "_maybe_activate_jit_monitor", "", file
    runner, file = model_runner.GPUModelRunner, "engine/v2/runner.py"
    yield runner, "__init__", "vllm_config device", file
    yield runner, "load_model", "load_dummy_weights args model kwargs", file
    yield runner, "initialize_kv_cache", "kv_cache_config is_profiling kv_cache_allocation_context", file
    yield runner, "add_requests", "scheduler_output", file
    yield runner, "prepare_inputs", "scheduler_output batch_req_state batch_desc num_active_loras", file
    yield runner, "prepare_attn", "input_batch", file
    yield runner, "_dummy_sampler_run", "hidden_states", file
    yield (
        runner,
        "execute_model",
        "scheduler_output intermediate_tensors dummy_run skip_attn_for_dummy_run is_profile context_len valid_dummy_state_slots "
        "randomize_inputs",
        file,
    )
    yield runner, "_set_active_loras", "prompt_lora_mapping token_lora_mapping lora_requests mapping_type", file
    yield runner, "sample", "hidden_states input_batch grammar_output", file
    yield runner, "sample_tokens", "grammar_output", file
    yield (
        DefaultModelState,
        "prepare_attn",
        "input_batch cudagraph_mode block_tables slot_mappings attn_groups kv_cache_config for_capture ubatch_idx "
        "model_specific_attn_metadata",
        file,
    )
    yield DefaultModelState, "prepare_inputs", "input_batch req_states", file
    yield (
        cudagraph_utils.ModelCudaGraphManager,
        "__init__",
        "vllm_config device cudagraph_mode decode_query_len lora_capture_cases varlen_decode ubatch_runner",
        file,
    )
    yield model_runner, "sort_batch_req_ids", "draft_tokens decode_query_len", file
    yield async_utils.AsyncOutput, "get_output", "", file
    file = "engine/v2/sampler.py"
    yield rejection_sampler.RejectionSampler, "__init__", "sampler spec_config device watermark_key", file
    yield rejection_sampler.RejectionSampler, "__call__", "logits input_batch draft_logits invalid_drafts", file
    yield rejection_sampler, "get_max_chunk_logits", "", file
    yield rejection_sampler, "_iter_request_chunks", "max_chunk_logits", file
    yield input_batch, "get_num_sampled_and_rejected", "seq_lens cu_num_logits idx_mapping prefill_len", file
    yield sampler.Sampler, "get_logprobs_dims", "idx_mapping_np include_token_ids", file
    yield (
        logprob,
        "compute_topk_scores",
        "num_logprobs sampled_token_ids cu_num_logits logprob_token_ids_state expanded_idx_mapping max_per_req_token_ids "
        "logits_mode",
        file,
    )
    yield logits, "get_num_nans", "", file
    yield outputs.LogprobsTensors, "cat", "cu_num_generated_tokens", file
    file = "engine/v2/rows.py"
    yield (
        sampler.Sampler,
        "apply_sampling_params",
        "logits expanded_idx_mapping idx_mapping idx_mapping_np pos input_ids expanded_local_pos seq_lens_upper_bound_np "
        "skip_top_k_top_p",
        file,
    )
    yield (
        gumbel,
        "gumbel_sample",
        "expanded_idx_mapping temperature seed pos apply_temperature is_drafting logits_cache logits_cache_col use_fp64 "
        "logits_cache_source",
        file,
    )
    file = "engine/v2/speculator.py"
    yield EagleSpeculator, "__init__", "vllm_config device", file
    yield (
        EagleSpeculator,
        "sample_draft",
        "hidden_states sample_src_positions idx_mapping temperature seeds draft_step draft_logits spec_step_idx"
        "| hidden_states sample_src_positions idx_mapping temperature seeds draft_step draft_logits spec_step_idx num_steps",
        file,
    )
    yield (
        EagleSpeculator,
        "propose",
        "input_batch attn_metadata slot_mappings last_hidden_states aux_hidden_states num_sampled num_rejected last_sampled "
        "next_prefill_tokens temperature seeds dp_sync_state dummy_run skip_attn_for_dummy_run mm_inputs is_profile "
        "num_speculative_tokens",
        file,
    )
    yield EagleSpeculator, "init_cudagraph_manager", "cudagraph_mode", file
    yield EagleSpeculator, "capture", "", file
    file = "engine/v2/catching_up.py"
    yield attn_utils, "build_slot_mappings_by_layer", "kv_cache_config", file
    yield (
        attn_utils,
        "build_attn_metadata",
        "num_reqs num_tokens query_start_loc_gpu query_start_loc_cpu max_query_len seq_lens max_seq_len block_tables "
        "slot_mappings kv_cache_config seq_lens_cpu_upper_bound dcp_local_seq_lens dcp_local_seq_lens_cpu_upper_bound positions "
        "is_prefilling mm_req_doc_ranges model_specific_attn_metadata for_cudagraph_capture causal rswa_prefix_lens ubatch_idx "
        "fast_prefill req_idx",
        file,
    )
    yield block_table.BlockTables, "compute_slot_mappings", "idx_mapping query_start_loc positions num_tokens_padded out", file
    file = "engine/v2/graphs.py"
    yield (
        SpeculatorCudaGraphManager,
        "__init__",
        "vllm_config device cudagraph_mode decode_query_len lora_capture_cases varlen_decode ubatch_runner",
        file,
    )
    yield cudagraph_utils.CudaGraphManager, "capture", "create_forward_fn progress_bar_desc", file
    yield cudagraph_utils.CudaGraphManager, "run_fullgraph", "desc", file
    file = "engine/v2/scheduler.py"
    yield AsyncScheduler, "_update_after_schedule", "scheduler_output", file
    yield Scheduler, "update_from_output", "scheduler_output model_runner_output", file
    yield Scheduler, "update_draft_token_ids_in_output", "draft_token_ids scheduler_output", file
    yield Scheduler, "get_grammar_bitmask", "scheduler_output", file
    file = "engine/v2/grammars.py"
    yield utils.DraftTokensHandler, "__init__", "device", file
    yield utils.DraftTokensHandler, "set_draft_tokens", "input_batch draft_tokens", file
    yield utils.DraftTokensHandler, "get_draft_tokens", "", file
