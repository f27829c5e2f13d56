"""What we rely on in vLLM: versions that were tested, and the signature and body of every symbol that we override or call.

A vLLM bump is a checklist: `check_seams` names what changed and the file to edit. `python -m tests.seams` compares two installed
vLLMs, and records the bodies of a version once it is tested (seams.json).
"""

import ast
import hashlib
import inspect
import json
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import vllm
from vllm.model_executor.models.llama_eagle import EagleLlamaForCausalLM
from vllm.platforms import current_platform
from vllm.utils import torch_utils
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_eagle.engine import cuda_seams

# With what was run there; the oldest first
TESTED_VERSIONS = {
    "0.32": "every test",
    "0.33": "engine and serving tests, on CPU: 0.33's Python over the compiled modules of 0.32, as there is no CPU wheel of it yet",
}
ALLOW_UNTESTED = "VLLM_EAGLE_ALLOW_UNTESTED"
BODIES = Path(__file__).with_name("seams.json")  # tested version -> symbol -> hash of its body, as Python 3.11 writes it

# Of the runners of all devices: method, parameters after self, the file here that relies on it
_RUNNER = (
    ("_prepare_inputs", "scheduler_output num_scheduled_tokens", "engine/v1/runner.py"),
    (
        "_build_attention_metadata",
        "num_tokens num_reqs max_query_len num_tokens_padded num_reqs_padded ubatch_slices logits_indices "
        "max_num_sampled_tokens use_spec_decode for_cudagraph_capture num_scheduled_tokens slot_mappings",
        "engine/v1/runner.py",
    ),
    ("_sample", "logits spec_decode_metadata", "engine/v1/runner.py"),
    ("_update_states_after_model_execute", "output_token_ids scheduler_output", "engine/v1/runner.py"),
    ("_input_fits_in_drafter", "common_attn_metadata", "engine/v1/runner.py"),
    ("_on_request_state_removed", "req_id req_state", "engine/v1/runner.py"),
    ("_setup_eagle3_aux_hidden_state_outputs", "", "engine/v1/runner.py"),
    ("_get_eagle3_aux_layers_from_config", "", "engine/v1/runner.py"),
    ("_bookkeeping_sync", "scheduler_output sampler_output logits hidden_states num_scheduled_tokens", "engine/v1/runner.py"),
    ("execute_model", "scheduler_output intermediate_tensors", "engine/v1/runner.py"),
    ("sample_tokens", "grammar_output", "engine/v1/runner.py"),
    (
        "propose_draft_token_ids",
        "scheduler_output sampled_token_ids sampling_metadata hidden_states sample_hidden_states aux_hidden_states "
        "spec_decode_metadata common_attn_metadata slot_mappings",
        "engine/v1/runner.py",
    ),
    ("take_draft_token_ids", "", "engine/v1/runner.py"),
    ("_sync_device", "", "engine/v1/planning.py"),
)

# class (or module), method, parameters after self (or after the first one), the file here that relies on it
_SEAMS = (
    (EngineCore, "post_step", "model_executed", "engine/v1/runner.py"),
    (Scheduler, "add_request", "request", "engine/v1/scheduler.py"),
    (Scheduler, "update_draft_token_ids", "draft_token_ids", "engine/v1/scheduler.py"),
    (Scheduler, "get_grammar_bitmask", "scheduler_output", "engine/v1/scheduler.py"),
    (StructuredOutputManager, "grammar_init", "request", "engine/v1/grammar.py"),
    (
        StructuredOutputManager,
        "grammar_bitmask",
        "requests structured_output_request_ids scheduled_spec_decode_tokens",
        "engine/v1/grammar.py",
    ),
    (EagleProposer, "initialize_attn_backend", "kv_cache_config kernel_block_sizes", "engine/v1/proposer.py"),
    (
        EagleProposer,
        "prepare_inputs",
        "common_attn_metadata sampled_token_ids num_draft_tokens",
        "engine/v1/proposer.py",
    ),
    (
        EagleProposer,
        "prepare_next_token_ids_cpu",
        "sampled_token_ids requests gpu_input_batch num_scheduled_tokens",
        "engine/v1/proposer.py",
    ),
    (
        EagleProposer,
        "propose",
        "num_speculative_tokens target_token_ids target_positions target_hidden_states next_token_ids "
        "token_indices_to_sample common_attn_metadata sampling_metadata mm_embed_inputs num_rejected_tokens_gpu slot_mappings",
        "engine/v1/proposer.py",
    ),
    (
        EagleProposer,
        "set_inputs_first_pass",
        "target_token_ids next_token_ids target_positions target_hidden_states token_indices_to_sample cad num_rejected_tokens_gpu",
        "engine/v1/proposer.py",
    ),
    (EagleProposer, "build_model_inputs_first_pass", "num_tokens num_input_tokens mm_embed_inputs", "engine/v1/proposer.py"),
    (EagleProposer, "_determine_batch_execution_and_padding", "num_tokens use_cudagraphs", "engine/v1/proposer.py"),
    (EagleProposer, "build_per_group_and_layer_attn_metadata", "common_attn_metadata draft_index", "engine/v1/proposer.py"),
    (EagleProposer, "_get_slot_mapping", "num_tokens slot_mapping", "engine/v1/proposer.py"),
    (EagleProposer, "load_model", "target_model", "engine/v1/proposer.py"),
    (EagleProposer, "_set_positions", "num_tokens positions", "engine/v1/proposer.py"),
    (EagleProposer, "dummy_run", "num_tokens use_cudagraphs is_graph_capturing slot_mappings", "engine/v1/proposer.py"),
    (EagleLlamaForCausalLM, "__init__", "vllm_config prefix", "engine/biased_head.py"),
    (EagleLlamaForCausalLM, "load_weights", "weights", "engine/biased_head.py"),
    (Sampler, "forward", "logits sampling_metadata predict_bonus_token logprobs_mode_override", "engine/v1/scorer.py"),
    (topk_topp_sampler, "random_sample", "generators use_fp64_gumbel", "algorithm/noise_rows.py"),
    (torch_utils, "async_tensor_h2d", "device dtype out", "engine/v1/runner.py"),
    (Worker, "shutdown", "", "engine/worker.py"),
    (GPUModelRunner, "load_model", "load_dummy_weights model", "engine/v1/runner.py"),
    (
        GPUModelRunner,
        "_dummy_run",
        "num_tokens cudagraph_runtime_mode force_attention uniform_decode allow_microbatching skip_eplb is_profile "
        "create_mixed_batch remove_lora is_graph_capturing num_active_loras profile_seq_lens randomize_inputs",
        "engine/v1/planning.py",
    ),
)


def _cpu_seams() -> Iterator[tuple[Any, str, str, str]]:
    """Of the CPU alone. Not to be asked for elsewhere: importing CPUWorker replaces parts of torch."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder
    from vllm.v1.worker.cpu_worker import CPUWorker

    for name, expected, file in _RUNNER:
        yield CPUModelRunner, name, expected, file
    yield CPUModelRunner, "load_model", "load_dummy_weights", "engine/v1/cpu_runner.py"
    yield CPUWorker, "init_device", "", "engine/v1/cpu_worker.py"
    yield CPUWorker, "__init__", "vllm_config local_rank rank distributed_init_method is_driver_worker", "engine/v1/cpu_worker.py"
    yield CPUWorker, "compile_or_warm_up_model", "", "engine/v1/cpu_worker.py"
    yield CPUAttentionBackendImpl, "forward", cuda_seams.FORWARD, "attention/cpu.py"
    yield CPUAttentionBackendImpl, "do_kv_cache_update", "layer key value kv_cache slot_mapping", "attention/cpu.py"
    yield CPUAttentionMetadataBuilder, "build", cuda_seams.BUILD, "attention/cpu.py"


def chat_stream() -> str:
    """The method of OpenAIServingChat that makes deltas of outputs. vLLM 0.33 has one for that alone, whatever API is spoken."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

    name = "chat_completion_stream_generator"
    return f"{name}_raw" if hasattr(OpenAIServingChat, f"{name}_raw") else name


def _serving_seams() -> Iterator[tuple[Any, str, str, str]]:
    """Of a server's front end. Workers do not ask for them, whose start the imports would slow down."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.responses.context import SimpleContext
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer, IncrementalDetokenizer

    file = "serving/streams.py"
    yield (
        OpenAIServingChat,
        chat_stream(),
        "request result_generator request_id model_name conversation tokenizer request_metadata chat_template_kwargs "
        "mm_token_counts",
        file,
    )
    yield (
        OpenAIServingResponses,
        "_process_simple_streaming_events",
        "request sampling_params result_generator context model_name tokenizer request_metadata created_time "
        "_increment_sequence_number_and_return",
        file,
    )
    yield SimpleContext, "append_output", "output", file
    yield IncrementalDetokenizer, "from_new_request", "request", file
    yield BaseIncrementalDetokenizer, "update", "new_token_ids stop_terminated", file
    yield BaseIncrementalDetokenizer, "get_next_output_text", "finished delta", file


def _seams() -> Iterator[tuple[Any, str, str, str]]:
    """Of this machine's engine; vLLM ships the GPU's files in every wheel."""
    yield from _SEAMS
    for name, expected, file in _RUNNER:
        yield GPUModelRunner, name, expected, file
    if current_platform.is_cpu():
        yield from _cpu_seams()
    if current_platform.is_cuda():
        yield from cuda_seams.of_attention()
        yield from cuda_seams.of_the_runner()


def changed_seams() -> list[str]:
    """One line per upstream symbol whose parameters are not the ones that our override was written for."""
    return list(_changed([*_seams(), *_serving_seams()]))


def _changed(seams: Iterable[tuple[Any, str, str, str]]) -> Iterator[str]:
    for owner, name, expected, file in seams:
        found = _parameters(owner, name)
        if found is None:
            yield f"{_name(owner)}.{name} is gone; edit {file}"
        elif found not in [each.split() for each in expected.split("|")]:  # of tested versions
            yield f"{_name(owner)}.{name} now takes ({', '.join(found)}); edit {file}"


def changed_bodies(version: str = vllm.__version__) -> list[str]:
    """One line per upstream symbol that does something else than when this version, or the newest one before, was tested.

    Empty where the hashes cannot be compared: they were made with Python 3.11.
    """
    if sys.version_info[:2] != (3, 11):
        return []
    known = known_version(version) or list(TESTED_VERSIONS)[-1]
    recorded = json.loads(BODIES.read_text())[known]
    return [
        f"{symbol} has another body than in {known}; read it, and {file}"
        for symbol, (_, body, file) in fingerprints([*_seams(), *_serving_seams()]).items()
        if body and body != recorded.get(symbol)
    ]


def fingerprints(seams: Iterable[tuple[Any, str, str, str]]) -> dict[str, tuple[str, str, str]]:
    """Of each upstream symbol: its parameters, a hash of its body, and our file that relies on it."""
    return {
        f"{_name(owner)}.{name}": (" ".join(_parameters(owner, name) or ["gone"]), _body(owner, name), file)
        for owner, name, _, file in seams
    }


def _name(owner: Any) -> str:
    """A class, which in the V2 runner may have the name of one of V1, or a module."""
    is_v2 = getattr(owner, "__module__", "").startswith("vllm.v1.worker.gpu.")
    return f"v2.{owner.__name__}" if is_v2 else str(owner.__name__)


def _parameters(owner: Any, name: str) -> list[str] | None:
    method = getattr(owner, name, None)
    return None if method is None else list(inspect.signature(inspect.unwrap(method)).parameters)[1:]


def _body(owner: Any, name: str) -> str:
    """Twelve hex digits, the same whatever comments, docstring and layout are; none if there is no source."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(owner, name))))
    except (AttributeError, OSError, TypeError):
        return ""
    (function,) = ast.parse(source).body
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return hashlib.sha256("\n".join(map(ast.unparse, [*function.decorator_list, *body])).encode()).hexdigest()[:12]


def known_version(version: str = vllm.__version__) -> str | None:
    """The tested version that this one is a release of, or None."""
    return next((tested for tested in TESTED_VERSIONS if version == tested or version.startswith(f"{tested}.")), None)


def version_problem(version: str = vllm.__version__) -> str | None:
    """Why this vLLM version is refused, or None."""
    if known_version(version) is not None:
        return None
    return (
        f"vllm_eagle was not tested with vLLM {version}; install vLLM {' or '.join(TESTED_VERSIONS)}, "
        f"or set {ALLOW_UNTESTED}=1 to try"
    )


@cache
def check_seams() -> None:
    """Refuse to start on a vLLM that differs where we hook in.

    Raises:
        ValueError: untested version, or changed signatures.
    """
    problem = version_problem()
    if problem and os.environ.get(ALLOW_UNTESTED) != "1":
        raise ValueError("\n  ".join([problem, *changed_seams(), *changed_bodies()]))
    _refuse(_seams())


@cache
def check_serving_seams() -> None:
    """Refuse to start a server on a vLLM whose front end differs where we hook in; `check_seams` is for the engine.

    Raises:
        ValueError: changed signatures.
    """
    _refuse(_serving_seams())


def _refuse(seams: Iterable[tuple[Any, str, str, str]]) -> None:
    changed = list(_changed(seams))
    if changed:
        raise ValueError(f"vLLM {vllm.__version__} differs from the one vllm_eagle overrides:\n  " + "\n  ".join(changed))
