"""Score the nodes of all trees: sample along each tree with vLLM's own sampler and keep the path.

The target pass gave one row of logits per node. Depth by depth, the rows of the nodes where the walks stand go through vLLM's
`Sampler` as one batch with one row per request, exactly the call that plain decoding makes for that position: the same sampling
metadata, penalties over the output so far, logits processors, and the next noise of the request's generator. Nothing is
approximated or handled twice, so whatever the sampler knows is exact under trees.

Where all requests are greedy, and the sampler looks at nothing but a row, one call samples after all nodes, and the walk looks up
what was sampled. Where noise is drawn, that would cost more for nodes off the way than the calls that are saved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitBiasLogitsProcessor, MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from vllm_eagle.algorithm.accept import Walk, accept
from vllm_eagle.algorithm.tree import DraftTree
from vllm_eagle.engine.v1.grammar import MaskAfter, apply_masks

PADDING = -1  # what vLLM ignores in a row of sampled tokens
_MOST_SCORES = 1 << 20  # in one call for all nodes; with more, calls for the nodes on the way alone cost less


class EagleTreeScorer:
    """Turns logits of tree nodes into emitted tokens."""

    def __init__(self, sampler: Sampler):
        self._sampler = sampler

    def score(
        self,
        logits: torch.Tensor,  # [sum of num_nodes, vocab]
        trees: Sequence[DraftTree],  # one per request; a root alone where nothing was drafted
        metadata: SamplingMetadata,
        outputs: Sequence[list[int]],  # output tokens per request, the lists that logits processors hold on to
        discarded: set[int],  # requests whose prompt is not complete: their sample is thrown away, so no noise is used
        grammars: Mapping[int, MaskAfter],  # of the constrained requests
    ) -> tuple[SamplerOutput, list[Walk]]:
        """Walk all trees.

        A grammar is asked for a node once `outputs` holds the tokens up to it; where it does not know, the walk ends there.

        Returns:
            sampled_token_ids [num_reqs, longest walk] int32, padded with -1, on the host, and logprobs of the same rows if asked
            for; and the walks.
        """
        if (thinking := metadata.thinking_budget_state_holder) is not None:
            thinking.in_spec_mode = False  # under speculation it counts rows by draft tokens; here there is one per request
        nothing_drafted = len(logits) == len(trees)
        if not grammars and (nothing_drafted or logits.numel() <= _MOST_SCORES) and is_greedy_row_by_row(metadata):
            return self._score_at_once(logits, trees, metadata)
        walks = [Walk(tree) for tree in trees]
        starts = _starts(trees)
        logprobs: list[LogprobsTensors] = []
        walking = set(range(len(walks)))
        masks = {i: mask for i, mask_after in grammars.items() if (mask := mask_after(0)) is not None}
        while walking:
            standing = logits
            if not nothing_drafted:
                rows = torch.from_numpy(starts[:-1] + [walk.node for walk in walks])
                standing = logits[async_tensor_h2d(rows, device=logits.device)]
            generators = {i: g for i, g in metadata.generators.items() if i in walking and i not in discarded}
            out = self._sampler(
                logits=apply_masks(standing, masks),
                # Drafted tokens are no business of the sampler's: rows are requests, as without speculation.
                sampling_metadata=replace(metadata, generators=generators, spec_token_ids=None),
            )
            for i, token_id in enumerate(out.sampled_token_ids[:, 0].tolist()):
                if i in walking:
                    walks[i].advance(token_id)
            if out.logprobs_tensors is not None:
                logprobs.append(out.logprobs_tensors)
            masks.clear()
            for i in list(walking):
                if not walks[i].done:
                    outputs[i].append(walks[i].token_ids[-1])
                    if i in grammars and (mask := grammars[i](walks[i].node)) is not None:
                        masks[i] = mask
                    elif i in grammars:
                        outputs[i].pop()
                        walks[i].stop()
                if walks[i].done:
                    walking.discard(i)
            if walking:  # what vLLM does between two steps of plain decoding
                for processor in metadata.logitsprocs.all:
                    processor.update_state(None)
        for walk, output in zip(walks, outputs, strict=True):
            if walk.path:
                del output[-len(walk.path) :]  # vLLM's bookkeeping appends the emitted tokens itself
        return SamplerOutput(_stack_tokens(walks), _stack_logprobs(logprobs)), walks

    def _score_at_once(
        self, logits: torch.Tensor, trees: Sequence[DraftTree], metadata: SamplingMetadata
    ) -> tuple[SamplerOutput, list[Walk]]:
        out = self._sampler(logits=logits, sampling_metadata=replace(metadata, generators={}, spec_token_ids=None))
        sampled, starts = out.sampled_token_ids[:, 0].tolist(), _starts(trees).tolist()
        walks = [accept(tree, sampled[start:end]) for tree, start, end in zip(trees, starts, starts[1:], strict=False)]
        return SamplerOutput(_stack_tokens(walks), None), walks


def _starts(trees: Sequence[DraftTree]) -> np.ndarray:
    """First rows of trees, and the number of rows: [len(trees) + 1] int64."""
    return np.cumsum([0, *(tree.num_nodes for tree in trees)])


def is_greedy_row_by_row(metadata: SamplingMetadata) -> bool:
    """Whether all requests are greedy, and vLLM's sampler looks at nothing but a row of logits."""
    thinking = metadata.thinking_budget_state_holder
    return (
        metadata.all_greedy
        and metadata.no_penalties
        and metadata.max_num_logprobs is None
        and not metadata.logprob_token_ids
        and metadata.allowed_token_ids_mask is None
        and not metadata.bad_words_token_ids
        and (thinking is None or not thinking.has_tracked_requests())
        and all(
            (isinstance(processor, LogitBiasLogitsProcessor) and not processor.biases)
            or (isinstance(processor, MinTokensLogitsProcessor) and not processor.min_toks)
            for processor in metadata.logitsprocs.non_argmax_invariant
        )
    )


def _stack_tokens(walks: list[Walk]) -> torch.Tensor:
    """On the host, where the walks know them and vLLM's bookkeeping wants them."""
    longest = max(len(walk.token_ids) for walk in walks)
    return torch.tensor([walk.token_ids + [PADDING] * (longest - len(walk.token_ids)) for walk in walks], dtype=torch.int32)


def _stack_logprobs(logprobs: list[LogprobsTensors]) -> LogprobsTensors | None:
    """Rows in the order that vLLM reads them in: request by request, depth by depth."""
    if not logprobs:
        return None
    if len(logprobs) == 1:
        return logprobs[0]
    fields = ("logprob_token_ids", "logprobs", "selected_token_ranks")
    stacked = (torch.stack([getattr(x, name) for x in logprobs], dim=1).flatten(0, 1) for name in fields)
    return LogprobsTensors(*stacked)
