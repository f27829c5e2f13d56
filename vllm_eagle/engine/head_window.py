"""The window over what the head attends to: set once its layers are there. Block accounting does not know of it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.heads.window import window_of

logger = init_logger(f"vllm.{__name__}")  # below "vllm", so that vLLM shows it with its own lines


def limit_head(config: VllmConfig, options: TreeConfig, layers: Mapping[str, Any], of_the_head: Iterable[str]) -> None:
    """Give the head's attention layers their window, if it has one.

    Prompts, committed tokens and levels all go by it. Their keys and values stay in the cache, whose groups and blocks are those
    that vLLM has worked out for full attention. Only drafts change.
    """
    folder = Path(config.speculative_config.draft_model_config.model)
    window = window_of(options.draft_window, folder, config.model_config.max_model_len)
    if not window:
        return
    window = max(window, options.depth_limit + 1)  # a node sees all of its path
    for name in of_the_head:
        layers[name].impl.limit_window(window)
    logger.info("Draft trees: the head attends to the newest %d tokens (draft_window)", window)
