"""Grammars along draft trees: which tokens may follow a node.

vLLM's scheduler keeps a grammar per constrained request and sends the bitmask of the root (scheduler.py). The worker keeps a second
one, built by the same vLLM classes, and uses it twice:

- drafting: every node that the head runs over gets its bitmask, with the grammar advanced to the node and rolled back again, so
  that forbidden tokens are never drafted;
- verification: on the way down the tree the grammar goes along token by token, and each visited node is masked as plain decoding
  would mask that position.

A grammar compiles in the background, as in the scheduler; until it is ready the request decodes without drafts.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import xgrammar
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.structured_output.request import StructuredOutputRequest
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from vllm_eagle.algorithm.draft import Level
from vllm_eagle.engine.grammars import grammars_follow_trees

logger = init_logger(f"vllm.{__name__}")  # below "vllm", so that vLLM shows it with its own lines


# node on a request's path -> the tokens that its grammar allows next, [vocab / 32] int32; None if that is not known here
MaskAfter = Callable[[int], np.ndarray | None]


@dataclass(slots=True)
class _Constrained:
    """One constrained request, with the attributes of vLLM's Request that StructuredOutputManager reads."""

    request_id: str
    sampling_params: SamplingParams
    structured_output_request: StructuredOutputRequest
    state: CachedRequestState  # the runner's, with the output so far
    num_followed: int = 0  # output tokens that the grammar has seen
    broken: bool = False  # the grammar could not be compiled, or refused a token that was emitted


class TreeGrammars:
    """The worker's grammars, by request id."""

    def __init__(self, vllm_config: VllmConfig):
        self._vllm_config = vllm_config
        self._follow_trees = grammars_follow_trees(vllm_config)
        # Ranks of a tensor-parallel group must take the same decisions, so none may be ready earlier than another.
        self._wait = vllm_config.parallel_config.tensor_parallel_size > 1
        self._requests: dict[str, _Constrained] = {}
        self._manager: StructuredOutputManager | None = None  # made for the first constrained request: it loads the tokenizer

    def start(self, req_id: str, state: CachedRequestState) -> None:
        """Take in a new request; its grammar, if it has one, compiles while the prompt runs."""
        structured = StructuredOutputRequest.from_sampling_params(state.sampling_params)
        if structured is None:
            return
        request = self._requests[req_id] = _Constrained(req_id, state.sampling_params, structured, state)
        if self._follow_trees:
            self._manager = self._manager or StructuredOutputManager(self._vllm_config)
            self._manager.grammar_init(request)

    def forget(self, req_id: str) -> None:
        """The request has ended."""
        self._requests.pop(req_id, None)

    def drafts_chain(self, req_id: str) -> bool:
        """Whether the request must draft a chain, because the scheduler masks it."""
        return not self._follow_trees and req_id in self._requests

    def ready(self, req_id: str) -> bool:
        """Whether the request can draft."""
        return not self._follow_trees or req_id not in self._requests or self._follow(self._requests[req_id]) is not None

    def masks(self, req_ids: Sequence[str], num_nodes: Sequence[int], from_scheduler: GrammarOutput | None) -> dict[int, MaskAfter]:
        """What the grammars of a step's constrained requests allow after each node, by place in `req_ids`.

        `num_nodes` are the sizes of their trees. The scheduler masks the root, or every node of a chain (scheduler.py).
        """
        if from_scheduler is None:
            return {}
        places = {req_id: place for place, req_id in enumerate(req_ids)}
        masks: dict[int, MaskAfter] = {}
        constrained, rows = from_scheduler.structured_output_request_ids, from_scheduler.grammar_bitmask
        counts = [1 if self._follow_trees else num_nodes[places[req_id]] for req_id in constrained]
        # As many rows as there are nodes (vLLM 0.32), or for each request as many as a tree can have (0.33).
        widths = counts if len(rows) == sum(counts) else [len(rows) // len(constrained)] * len(constrained)
        start = 0
        for req_id, count, width in zip(constrained, counts, widths, strict=True):
            masks[places[req_id]] = partial(self._mask_after, req_id, rows[start : start + count])
            start += width
        return masks

    def constraints(self, req_ids: Sequence[str]) -> "DraftConstraints":
        """What grammars allow the drafts of these requests, all of them ready."""
        found: dict[int, StructuredOutputGrammar] = {}
        for place, req_id in enumerate(req_ids):
            if self._follow_trees and req_id in self._requests:
                grammar = self._follow(self._requests[req_id])
                assert grammar is not None
                found[place] = grammar
        return DraftConstraints(found, self._mask)

    def _mask_after(self, req_id: str, from_scheduler: np.ndarray, node: int) -> np.ndarray | None:
        if node < len(from_scheduler):
            row: np.ndarray = from_scheduler[node]
            return row
        grammar = self._follow(self._requests[req_id])
        return None if grammar is None else self._mask(grammar)

    def _follow(self, request: _Constrained) -> StructuredOutputGrammar | None:
        """Advance a grammar to the end of its request's output. None: not ready yet, or not usable."""
        structured = request.structured_output_request
        while self._wait and not structured.is_grammar_ready:
            time.sleep(0.001)
        grammar = structured.grammar
        if grammar is None or request.broken:
            return None
        if isinstance(grammar, Exception):
            request.broken = True  # the scheduler ends this request with the same error
            return None
        new = request.state.output_token_ids[request.num_followed :]
        if new and not grammar.accept_tokens(request.request_id, new):
            logger.error("Request %s: the worker's grammar refuses emitted tokens; it goes on without drafts.", request.request_id)
            request.broken = True
            return None
        request.num_followed += len(new)
        return grammar

    def _mask(self, grammar: StructuredOutputGrammar) -> np.ndarray:
        """What may come next: [vocab / 32] int32, a bit per token; everything once the grammar has ended."""
        assert self._manager is not None
        assert self._manager.backend is not None
        bitmask = self._manager.backend.allocate_token_bitmask(1).fill_(-1)
        if not grammar.is_terminated():
            grammar.fill_bitmask(bitmask, 0)
        row: np.ndarray = bitmask.numpy()[0]
        return row


class DraftConstraints:
    """Masks the head's logits, level by level, for the requests of one drafting round that have a grammar."""

    def __init__(
        self,
        grammars: Mapping[int, StructuredOutputGrammar],  # by place among the drafting requests
        mask: Callable[[StructuredOutputGrammar], np.ndarray],
    ):
        self._grammars = grammars
        self._mask = mask
        self._token_ids: np.ndarray | None = None
        self._paths: dict[int, list[list[int]]] = {place: [[]] for place in grammars}  # tokens from the root to each row

    def over(self, token_ids: torch.Tensor | None) -> "DraftConstraints":
        """For logits of these tokens [draft_vocab] int64; None: of the target's vocabulary."""
        if self._grammars and token_ids is not None:
            self._token_ids = token_ids.cpu().numpy()
        return self

    def root(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [num_drafting, draft_vocab] after the roots."""
        return self._apply(logits[:, None])[:, 0] if self._grammars else logits

    def level(self, level: Level, logits: torch.Tensor) -> torch.Tensor:
        """Logits [num_drafting, width, draft_vocab] after the nodes of a level."""
        if not self._grammars:
            return logits
        for place, paths in self._paths.items():
            rows = zip(level.parent_rows[place].tolist(), level.token_ids[place].tolist(), strict=True)
            self._paths[place] = [[*paths[parent], token_id] for parent, token_id in rows]
        return self._apply(logits)

    def _apply(self, logits: torch.Tensor) -> torch.Tensor:
        masks: dict[int, np.ndarray] = {}
        width = logits.shape[1]
        for place, grammar in self._grammars.items():
            for row, path in enumerate(self._paths[place]):
                if (found := self._mask_after(grammar, path)) is not None:
                    masks[place * width + row] = found if self._token_ids is None else _of_tokens(found, self._token_ids)
        flat = logits.flatten(0, 1)
        return apply_masks(flat, masks).view(logits.shape)

    def _mask_after(self, grammar: StructuredOutputGrammar, path: list[int]) -> np.ndarray | None:
        """The mask after a path; None for one that the grammar forbids: such rows are copies that growth ignores."""
        if grammar.validate_tokens(path) != path:
            return None
        if path:
            grammar.accept_tokens("", path)
        found = self._mask(grammar)
        grammar.rollback(len(path))
        return found


def _of_tokens(mask: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """A mask [vocab / 32] int32 for logits of these tokens [draft_vocab]: [draft_vocab / 32] int32."""
    allowed = (mask[token_ids // 32] >> (token_ids % 32)) & 1
    # Ones at the end: xgrammar writes to all that is forbidden, beyond the row's end, too.
    padded = np.pad(allowed.astype(np.uint8), (0, -len(allowed) % 32), constant_values=1)
    return np.packbits(padded, bitorder="little").view(np.int32)


def apply_masks(logits: torch.Tensor, masks: Mapping[int, np.ndarray]) -> torch.Tensor:
    """Logits [rows, vocab] with forbidden tokens at minus infinity in the rows that have a mask, as vLLM applies them."""
    if not masks:
        return logits
    rows = list(masks)
    bitmask = torch.full((logits.shape[0], next(iter(masks.values())).shape[0]), -1, dtype=torch.int32)
    for row, mask in masks.items():
        bitmask[row] = torch.from_numpy(mask)
    masked = logits.float().contiguous()
    xgrammar.apply_token_bitmask_inplace(masked, async_tensor_h2d(bitmask, device=logits.device), indices=rows)
    return masked.to(logits.dtype)
