"""One set of tree options -> vLLM's engine arguments. Used by the offline helper, the plugin and the command line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vllm.logger import init_logger

from vllm_eagle.algorithm.config import CONFIG_KEY, TreeConfig
from vllm_eagle.heads.served import served
from vllm_eagle.heads.target import Target
from vllm_eagle.options import devices

logger = init_logger(f"vllm.{__name__}")  # below "vllm", so that vLLM shows it with its own lines

Method = Literal["eagle", "eagle3"]
MTP = "mtp"  # vLLM's method for modules that lie in the target's own checkpoint
# Most nodes of a tree where nobody says: with the budget, more than pay on most machines, since it takes as many as do.
_WITH_BUDGET, _WITHOUT = 64, 16


def default_draft_tokens(options: Mapping[str, Any]) -> int:
    """vLLM's num_speculative_tokens, by tree options, where it is not given."""
    sized_by_cost = options.get("budget", True) and options.get("mode", "dynamic") == "dynamic"
    return _WITH_BUDGET if sized_by_cost else _WITHOUT


def serve_head(head: str | Path, target: str | Path | None = None, revision: str | None = None) -> tuple[str, Method]:
    """Judge a head before anything is loaded: the folder that vLLM gets, a converted copy if it takes that, and its method.

    Args:
        head: a folder, or a name on the hub, which is fetched as vLLM would.
        target: the target's folder or name; without it, only the head itself is judged.
        revision: of the head on the hub.

    Raises:
        ValueError: there is no such head, it is broken, or it does not fit the target.
    """
    try:
        found = served(_folder_of(str(head), revision), _target(target))
    except ValueError as error:
        raise ValueError(f"speculative model {error}") from None
    if found.why is not None:
        logger.info("Head %s: %s; served from a converted copy, %s", head, found.why, found.folder)
    return str(found.folder), "eagle" if found.kind == "EAGLE-1" else "eagle3"


def _folder_of(head: str, revision: str | None) -> Path:
    if Path(head).is_dir():
        return Path(head)
    if Path(head).is_absolute() or head.startswith((".", "~")) or head.count("/") > 1:
        raise ValueError(f"{head}: no such folder; set spec_model to the folder of an EAGLE head, or to its name on the hub")
    import huggingface_hub

    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    for weights in ("*.safetensors", "*.bin"):
        try:
            folder = huggingface_hub.snapshot_download(
                head, revision=revision, allow_patterns=["*.json", weights], local_files_only=offline
            )
        except Exception as error:  # of many kinds, from the network to the name
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{head}: no such folder, and no such head on the hub ({reason}); set spec_model to one") from None
        if list(Path(folder).glob(weights)):
            break
    return Path(folder)


def _target(target: str | Path | None) -> Target | None:
    """What can be known of the target before vLLM reads it; engine/support.py asks again when it has."""
    if target is None:
        return None
    folder = Path(target)
    if not folder.is_dir():
        import huggingface_hub

        found = huggingface_hub.try_to_load_from_cache(str(target), "config.json") if str(target).count("/") == 1 else None
        if not isinstance(found, str):
            return None
        folder = Path(found).parent
    try:
        return Target.read(folder)
    except ValueError:
        return None


def speculative_settings(
    settings: Mapping[str, Any], options: Mapping[str, Any], target: str | Path | None = None
) -> dict[str, Any]:
    """Complete vLLM's speculative_config for tree mode, and check head and tree options against it.

    Raises:
        ValueError: an option is unknown, impossible or contradicts tree mode; or the head cannot be served.
    """
    completed = dict(settings)
    if completed.get("method") == MTP:
        return _of_a_module(completed, options, target)
    if not completed.get("model"):
        raise ValueError(
            f"additional_config[{CONFIG_KEY!r}] (or a --speculative-tree flag) asks for draft trees; "
            "set --speculative-model (spec_model) to an EAGLE head"
        )
    if completed.get("method", "eagle") not in ("eagle", "eagle3"):
        raise ValueError(
            f'speculative method "{completed["method"]}" drafts no trees; set it to "eagle" or "eagle3", '
            f"or remove additional_config[{CONFIG_KEY!r}]"
        )
    _complete_trees(completed, options)
    head = completed["model"]
    completed["model"], method = serve_head(head, target, completed.get("revision"))
    if completed.setdefault("method", method) != method:
        raise ValueError(f'speculative method "{completed["method"]}", but {head} is a head for "{method}"; set that, or nothing')
    return completed


def _complete_trees(completed: dict[str, Any], options: Mapping[str, Any]) -> None:
    wanted = devices.engine().disable_padded_drafter_batch
    if completed.setdefault("disable_padded_drafter_batch", wanted) is not wanted:
        raise ValueError(f"disable_padded_drafter_batch={json.dumps(not wanted)} contradicts draft trees; remove it")
    num_draft_tokens = completed.setdefault("num_speculative_tokens", default_draft_tokens(options))
    TreeConfig.from_options(num_draft_tokens, options)


def _of_a_module(completed: dict[str, Any], options: Mapping[str, Any], target: str | Path | None) -> dict[str, Any]:
    """Settings for a target that brings its drafter; whether that has trees is asked once vLLM has read it (engine/support.py)."""
    if completed.get("model") not in (None, target if target is None else str(target)):
        raise ValueError(
            f'speculative method "{MTP}" drafts with a module of the target itself, got the model {completed["model"]}; remove it, '
            "or remove the method to draft with an EAGLE head"
        )
    _complete_trees(completed, options)
    return completed


def engine_args(
    head: str | Path,
    num_draft_tokens: int | None = None,
    target: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Arguments for vLLM's `LLM(...)` or `AsyncEngineArgs(...)` that switch draft trees on.

    `num_draft_tokens` are the most nodes of a tree (without it: `default_draft_tokens`), `options` the other fields of TreeConfig;
    with `target`, the head is judged for it at once. Works on CPU without the plugin being
    loaded, except for min-p and logit bias; on CUDA the plugin fills in more (options/devices.py).

    Raises:
        ValueError: an option is impossible, the head cannot be loaded, or the platform is neither CPU nor CUDA.
    """
    wanted = {} if num_draft_tokens is None else {"num_speculative_tokens": num_draft_tokens}
    settings = speculative_settings({"model": str(head)} | wanted, options, target)
    engine = devices.engine()
    return {
        "speculative_config": settings,
        "worker_cls": engine.worker_cls,
        "scheduler_cls": engine.scheduler_cls,
        "additional_config": {CONFIG_KEY: options},
        **({} if engine.is_v2 else {"async_scheduling": False}),
    }
