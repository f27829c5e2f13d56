"""`register()`: what vLLM calls in every process (entry point `vllm.general_plugins`). Imports nothing heavy, may run twice.

Three marked wraps, which change nothing unless draft trees are asked for:
- `EngineArgs.add_cli_args` gets our flags (options/flags.py), which all end up in `additional_config["vllm_eagle"]`;
- `EngineArgs.create_engine_config` completes the speculative configuration and names our worker for the device
  (options/devices.py); without trees it only says how to get them, where the model is an EAGLE head itself;
- `SamplingParams._validate_spec_decode`, which refuses min-p and logit bias under speculation, is skipped in tree mode: there
  the scorer runs vLLM's sampler as plain decoding does, so both are exact. Instead the request's own tree options are checked.

A server with draft trees gets two more, so that streamed answers which vLLM parses are those without trees (serving/streams.py):
`OpenAIServingChat.chat_completion_stream_generator` and `OpenAIServingResponses._process_simple_streaming_events`.

And model classes are added to vLLM's registry, for folders that ask for them by name: converted heads (engine/biased_head.py), and
the pairs of `vllm-eagle bench --replay` (bench/recorded/replay_models.py).
"""

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_eagle.algorithm.config import CONFIG_KEY
from vllm_eagle.heads.formats import BIASED_ARCHITECTURE, REPLAYED_ARCHITECTURES
from vllm_eagle.options import devices
from vllm_eagle.options.engine_args import speculative_settings
from vllm_eagle.options.flags import HEAD_OPTIONS, add_flags, flag
from vllm_eagle.options.per_request import RequestOptions

_MARK = "_vllm_eagle_wraps"
_MODELS = {BIASED_ARCHITECTURE: "vllm_eagle.engine.biased_head"} | dict.fromkeys(
    REPLAYED_ARCHITECTURES, "vllm_eagle.bench.recorded.replay_models"
)


def register() -> None:
    """Install the wraps and the model classes once."""
    from vllm import ModelRegistry
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams

    _wrap(EngineArgs, "add_cli_args", _with_flags)
    _wrap(EngineArgs, "create_engine_config", _with_trees)
    _wrap(SamplingParams, "_validate_spec_decode", _unless_trees)
    for name, module in _MODELS.items():
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, f"{module}:{name}")


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(wrapped, _MARK, original)
    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(wrapped) if static else wrapped)


def _with_flags(original: Callable[..., Any], parser: Any, *args: Any, **kwargs: Any) -> Any:
    parser = original(parser, *args, **kwargs)
    add_flags(parser)
    return parser


def _with_trees(original: Callable[..., Any], self: Any, usage_context: Any = None, *args: Any, **kwargs: Any) -> Any:
    if CONFIG_KEY in (self.additional_config or {}):
        _ask_for_trees(self)
    else:
        _if_a_head_is_served(self)
    config = original(self, usage_context, *args, **kwargs)
    if devices.is_tree_mode(config.speculative_config):
        from vllm.usage.usage_lib import UsageContext

        from vllm_eagle.engine.support import check_supported

        check_supported(config)
        if usage_context is UsageContext.OPENAI_API_SERVER:
            _prepare_server(config)
    return config


def _if_a_head_is_served(args: Any) -> None:
    """Say what to do with an EAGLE head in place of a model: vLLM serves those of speculators with chains, if they name a target.

    Raises:
        ValueError: the head names none.
    """
    from vllm.logger import init_logger

    config = Path(args.model) / "config.json"
    try:
        settings = json.loads(config.read_text()) if config.is_file() else {}
    except ValueError:
        return  # vLLM says so
    if not isinstance(settings, dict) or settings.get("speculators_model_type") != "eagle3":
        return
    verifier = ((settings.get("speculators_config") or {}).get("verifier") or {}).get("name_or_path")
    if not verifier:
        raise ValueError(
            f"model {args.model}: an EAGLE head, and it names no target; serve the target: "
            f"vllm serve TARGET {flag('model')} {args.model}"
        )
    init_logger(f"vllm.{__name__}").info(
        "%s is an EAGLE head, which vLLM serves with chains for %s. For draft trees: vllm serve %s %s %s",
        args.model, verifier, verifier, flag("model"), args.model,
    )  # fmt: skip


def _prepare_server(config: Any) -> None:
    """In a process that answers requests, or starts those that do. In `register` its imports would slow down all others."""
    from vllm import envs
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.logger import init_logger

    from vllm_eagle.engine.seams import chat_stream, check_serving_seams
    from vllm_eagle.options.instances import remember
    from vllm_eagle.serving.streams import chat_by_token, responses_by_token

    if envs.VLLM_USE_RUST_FRONTEND:
        init_logger(f"vllm.{__name__}").warning(
            "vLLM's Rust front end runs no plugins: no vllm_eagle_ metrics in /metrics, and streamed answers that it parses may "
            "differ from those without trees; unset VLLM_USE_RUST_FRONTEND."
        )
    remember(config)
    check_serving_seams()
    _wrap(OpenAIServingChat, chat_stream(), chat_by_token)
    _wrap(OpenAIServingResponses, "_process_simple_streaming_events", responses_by_token)


def _ask_for_trees(args: Any) -> None:
    """Fill in what tree mode needs; `args` is vLLM's EngineArgs."""
    given = args.additional_config[CONFIG_KEY]
    if not isinstance(given, dict):
        raise ValueError(f"additional_config[{CONFIG_KEY!r}] must be an object of tree options, got {given!r}")
    options = {name: value for name, value in given.items() if name not in HEAD_OPTIONS}
    settings = dict(args.speculative_config or {})
    # vLLM's own short flags; it refuses them beside the same key of speculative_config, so they move over. Ours join them.
    for name, key in (("spec_method", "method"), ("spec_model", "model"), ("spec_tokens", "num_speculative_tokens")):
        value = getattr(args, name)
        if value is not None:
            if key in settings:
                raise ValueError(f"--{name.replace('_', '-')} and speculative_config[{key!r}] are both set; remove one")
            settings[key] = value
            setattr(args, name, None)
    for name, key in HEAD_OPTIONS.items():
        if name in given:
            if key in settings:
                raise ValueError(
                    f"{flag(name)} (additional_config[{CONFIG_KEY!r}][{name!r}]) and vLLM's own option for {key!r} "
                    f"(--speculative-config, --spec-model, --spec-tokens) are both set; remove one"
                )
            settings[key] = given[name]
    args.additional_config = args.additional_config | {CONFIG_KEY: options}
    engine = devices.engine()
    if args.worker_cls not in ("auto", engine.worker_cls):
        raise ValueError(f"worker_cls={args.worker_cls} contradicts draft trees, which need their own worker; remove it")
    if args.async_scheduling and not engine.is_v2:
        raise ValueError(f"async_scheduling=true contradicts draft trees on {engine.device}; remove it")
    args.speculative_config = speculative_settings(settings, options, None if args.hf_overrides else args.model)
    if args.scheduler_cls not in (None, engine.scheduler_cls):
        raise ValueError(f"scheduler_cls={args.scheduler_cls} contradicts draft trees, which need their own scheduler; remove it")
    devices.fill_in(args)


def _unless_trees(original: Callable[..., Any], self: Any, speculative_config: Any) -> None:
    if devices.is_tree_mode(speculative_config):
        from vllm.exceptions import VLLMValidationError  # the one kind of error that its server lays at the client's door

        try:
            RequestOptions.from_extra_args(self.extra_args, speculative_config.num_speculative_tokens)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
    else:
        original(self, speculative_config)
