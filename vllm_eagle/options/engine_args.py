"""One set of tree options -> vLLM's engine arguments. Used by the offline helper, the plugin and the command line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vllm_eagle.algorithm.config import CONFIG_KEY, TreeConfig
from vllm_eagle.options.devices import worker_cls

SCHEDULER = "vllm_eagle.engine.v1.scheduler.EagleTreeScheduler"
DEFAULT_DRAFT_TOKENS = 16


def head_method(head: str | Path) -> Literal["eagle", "eagle3"]:
    """Tell an EAGLE-1/2 head from an EAGLE-3 head by its config.

    Raises:
        ValueError: the folder or its config.json is missing or unreadable.
    """
    path = Path(head)
    if not path.is_dir():
        # Not a folder: a name for vLLM's hub client to resolve, recognisable only by its name.
        if path.is_absolute() or str(head).startswith((".", "~")):
            raise ValueError(f"speculative model {head}: no such folder; set spec_model to the folder of an EAGLE head")
        return "eagle3" if "eagle3" in str(head).lower() else "eagle"
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise ValueError(
            f"speculative model {head}: config.json is missing; set spec_model to the folder of an EAGLE head"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"speculative model {head}: config.json is no JSON ({error}); repair or download it again") from None
    if not list(path.glob("*.safetensors")) and not list(path.glob("*.bin")):
        raise ValueError(f"speculative model {head}: no weights (*.safetensors) beside config.json; download the head again")
    names = str(config.get("architectures") or "")
    is_eagle3 = "Eagle3" in names or any(
        key in config for key in ("draft_vocab_size", "eagle_config", "eagle_aux_hidden_state_layer_ids")
    )
    num_layers = config.get("num_hidden_layers")
    if not is_eagle3 and "Eagle" not in names and isinstance(num_layers, int) and num_layers > 1:
        raise ValueError(
            f"speculative model {head}: a whole language model of {num_layers} layers, no EAGLE head; "
            "for a draft model without trees use vLLM's own --spec-model"
        )
    return "eagle3" if is_eagle3 else "eagle"


def _refuse_unconverted(head: str | Path) -> None:
    """Refuse a folder that vLLM would fail to load, or load wrongly. Reads its config.json and the names of its weights.

    Raises:
        ValueError: the head needs `vllm-eagle convert`.
    """
    path = Path(head)
    if not path.is_dir():
        return
    from vllm_eagle.heads.checkpoint import tensor_names
    from vllm_eagle.heads.formats import conversion_reason, read_config

    reason = conversion_reason(read_config(path), tensor_names(path))
    if reason:
        raise ValueError(
            f"speculative model {head}: {reason}; run `vllm-eagle convert {head} NEW_FOLDER` and set spec_model to NEW_FOLDER"
        )


def speculative_settings(settings: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Complete vLLM's speculative_config for tree mode and check the tree options against it.

    Raises:
        ValueError: an option is unknown, impossible or contradicts tree mode.
    """
    completed = dict(settings)
    if not completed.get("model"):
        raise ValueError(
            f"additional_config[{CONFIG_KEY!r}] (or a --speculative-tree flag) asks for draft trees; "
            "set --speculative-model (spec_model) to an EAGLE head"
        )
    completed.setdefault("method", head_method(completed["model"]))
    _refuse_unconverted(completed["model"])
    if completed["method"] not in ("eagle", "eagle3"):
        raise ValueError(
            f'speculative method "{completed["method"]}" drafts no trees; set it to "eagle" or "eagle3", '
            f"or remove additional_config[{CONFIG_KEY!r}]"
        )
    if completed.setdefault("disable_padded_drafter_batch", True) is not True:
        raise ValueError("disable_padded_drafter_batch=false contradicts draft trees; remove it")
    num_draft_tokens = completed.setdefault("num_speculative_tokens", DEFAULT_DRAFT_TOKENS)
    TreeConfig.from_options(num_draft_tokens, options)
    return completed


def engine_args(
    head: str | Path,
    num_draft_tokens: int = DEFAULT_DRAFT_TOKENS,
    **options: Any,
) -> dict[str, Any]:
    """Arguments for vLLM's `LLM(...)` or `AsyncEngineArgs(...)` that switch draft trees on.

    `options` are the fields of TreeConfig. Works on CPU without the plugin being loaded, except for min-p and logit bias; on CUDA
    the plugin fills in more (options/devices.py).

    Raises:
        ValueError: an option is impossible, the head cannot be loaded, or the platform is neither CPU nor CUDA.
    """
    settings = speculative_settings({"model": str(head), "num_speculative_tokens": num_draft_tokens}, options)
    return {
        "speculative_config": settings,
        "worker_cls": worker_cls(),
        "scheduler_cls": SCHEDULER,
        "async_scheduling": False,
        "additional_config": {CONFIG_KEY: options},
    }
