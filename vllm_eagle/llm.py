"""vLLM's offline `LLM` with draft trees switched on."""

from pathlib import Path
from typing import Any

import vllm

from vllm_eagle.options.engine_args import engine_args


class LLM(vllm.LLM):
    """`vllm.LLM`, plus an EAGLE head.

        llm = vllm_eagle.LLM("path/to/model", head="path/to/eagle-head", num_draft_tokens=16)

    `tree` holds further fields of `TreeConfig`, e.g. `{"topk": 4, "coupled": False}`; everything else goes to vLLM.

    Raises:
        ValueError: the head is missing or unreadable, a tree option is unknown or impossible, or the combination with the
            model or another option is not supported.
    """

    def __init__(
        self,
        model: str | Path,
        head: str | Path,
        num_draft_tokens: int | None = None,  # most nodes of a tree
        tree: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        settings = engine_args(head, num_draft_tokens, model, **(tree or {}))
        settings["additional_config"] = (kwargs.pop("additional_config", None) or {}) | settings["additional_config"]
        for name in settings.keys() & kwargs.keys():
            raise ValueError(f"{name} is set by vllm_eagle.LLM; remove it, or use vllm.LLM with the options in the README")
        super().__init__(str(model), **settings, **kwargs)

    def tree_stats(self) -> dict[str, Any]:
        """Counters of tree decoding so far: acceptance length tau, acceptance per depth, nodes drafted and verified."""
        stats: dict[str, Any] = self.collective_rpc("eagle_stats")[0]
        return stats
