"""Options of a draft tree, read from vLLM's `additional_config["vllm_eagle"]` and checked before a model is loaded."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from vllm_eagle.algorithm.shapes import StaticShape, best_static_shape

CONFIG_KEY = "vllm_eagle"
Mode = Literal["dynamic", "static", "chain"]
MAX_DRAFT_TOKENS = 127  # vLLM's rejection sampler, which profiling runs, allows 128 tokens per request


@dataclass(frozen=True, slots=True)
class TreeConfig:
    """Shape of the draft trees. Verification cost grows with num_draft_tokens, drafting latency with max_depth.

    The text of each field is that of `vllm serve --help=speculative-tree` and of the README.
    """

    # vLLM's num_speculative_tokens
    num_draft_tokens: Annotated[
        int, "most nodes per request, root not counted (default: 64, of which the budget takes as many as pay; without it 16)"
    ]
    mode: Annotated[Mode, "`dynamic`: grown by confidence (EAGLE-2); `static`: one fixed shape (EAGLE-1); `chain`: no branches"] = (
        "dynamic"
    )
    topk: Annotated[int, "children drafted per expanded node, and nodes expanded per level"] = 10
    max_depth: Annotated[int, "most head passes per step; a chain may be as deep as it has nodes"] = 8
    coupled: Annotated[bool, "draft with the noise that verification will use; `false`: plain top-k"] = True
    confidence_scale: Annotated[float, "divides log-probabilities before they become confidences; below 1 trusts the head more"] = (
        0.9
    )
    static_shape: Annotated[
        StaticShape | None,
        "for `static`: child ranks from the root to each node, e.g. `[[0], [1], [0, 0]]`; without it, the best shape for a "
        "typical head",
    ] = None
    budget: Annotated[
        bool,
        "draft as deep and verify as many nodes as pay on this machine under this load, down to none; `false`: as many as allowed",
    ] = True
    draft_window: Annotated[
        int | None,
        "newest tokens that the head attends to when it drafts, 0: all; without it, as many as the head says that it was trained "
        "for; on CUDA then all",
    ] = None
    draft_vocab: Annotated[bool, "draft the tokens of the head's `draft_vocab.json` only, if it has one; `false`: any token"] = True
    show_text: Annotated[bool, "let the `/eagle` page show the text of the last drafted trees"] = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode={self.mode!r} is unknown; set mode to one of {', '.join(get_args(Mode))}")
        for name, low, high in (
            ("num_draft_tokens", 1, MAX_DRAFT_TOKENS),
            ("topk", 1, 64),
            ("max_depth", 1, MAX_DRAFT_TOKENS),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name}={value!r} is not possible; set {name} to an integer from {low} to {high}")
        window = self.draft_window
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 0):
            raise ValueError(f"draft_window={window!r} is not possible; set draft_window to a number of tokens, or to 0 for all")
        if window and window <= self.depth_limit:
            raise ValueError(
                f"draft_window={window} would hide nodes from their own descendants, trees may be {self.depth_limit} deep; set "
                f"draft_window to at least {self.depth_limit + 1}, or to 0 for all tokens"
            )
        for name in ("coupled", "budget", "draft_vocab", "show_text"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not possible; set {name} to true or false")
        if isinstance(self.confidence_scale, bool) or not isinstance(self.confidence_scale, int | float):
            raise ValueError(f"confidence_scale={self.confidence_scale!r} is not possible; set it to a number above 0")
        if not 0 < self.confidence_scale <= 10:
            raise ValueError(f"confidence_scale={self.confidence_scale} is not possible; set it above 0 and at most 10")
        if self.static_shape is not None:
            if self.mode != "static":
                raise ValueError(f'static_shape needs mode "static", got mode "{self.mode}"; set mode or drop static_shape')
            if len(self.static_shape) > self.num_draft_tokens:
                raise ValueError(
                    f"static_shape has {len(self.static_shape)} nodes, num_speculative_tokens allows "
                    f"{self.num_draft_tokens}; raise num_speculative_tokens or remove nodes from static_shape"
                )

    @property
    def depth_limit(self) -> int:
        """Most levels that drafting may grow."""
        if self.mode == "static":
            return self.shape.depth
        if self.mode == "chain":
            return self.num_draft_tokens
        return min(self.max_depth, self.num_draft_tokens)

    @property
    def children(self) -> int:
        """Children drafted per expanded node."""
        if self.mode == "static":
            return self.shape.num_ranks
        return 1 if self.mode == "chain" else min(self.topk, self.num_draft_tokens)

    @property
    def level_width(self) -> int:
        """Most nodes of one request that one pass of the head runs over."""
        if self.mode == "static":
            return max(len(self.shape.inner(depth)) for depth in range(self.depth_limit))
        return self.children

    @property
    def shape(self) -> StaticShape:
        """The fixed shape of mode "static"."""
        return self.static_shape or best_static_shape(self.num_draft_tokens)

    @classmethod
    def from_options(cls, num_draft_tokens: int, options: Mapping[str, Any]) -> "TreeConfig":
        """Build from vLLM's num_speculative_tokens and the options under `additional_config["vllm_eagle"]`.

        Raises:
            ValueError: an option is unknown or has an impossible value; the message names it and the fix.
        """
        allowed = {field.name for field in dataclasses.fields(cls)} - {"num_draft_tokens"}
        for name in options:
            if name not in allowed:
                raise ValueError(
                    f"unknown option {name!r} in additional_config[{CONFIG_KEY!r}]; known options: {', '.join(sorted(allowed))}"
                )
        values = dict(options)
        shape: Sequence[Sequence[int]] | None = values.get("static_shape")
        if shape is not None:
            values["static_shape"] = StaticShape.from_paths(shape)
        return cls(num_draft_tokens=num_draft_tokens, **values)
