"""Score the nodes of all trees: sample along each tree with vLLM's own sampler and keep the path.

The target pass gave one row of logits per node. Depth by depth, the rows of the nodes where the walks stand go through vLLM's
`Sampler` as one batch with one row per request, exactly the call that plain decoding makes for that position: the same sampling
metadata, penalties over the output so far, logits processors, and the next noise of the request's generator. Nothing is
approximated or handled twice, so whatever the sampler knows is exact under trees. Where it would do nothing but take the greatest
logit of each row, one call takes those of all nodes.

Sampled rows cannot go through it all at once, on no device: it draws the noise of a row from the request's generator (a number on
CPU, a row of numbers on a GPU), so every row would use up noise, and all nodes of one depth must see the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitBiasLogitsProcessor, MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from vllm_eagle.accept import Walk, accept
from vllm_eagle.engine.grammar import MaskAfter, apply_masks
from vllm_eagle.tree import DraftTree

PADDING = -1  # what vLLM ignores in a row of sampled tokens
# In one call for all nodes on CPU; with more, calls for the nodes on the way alone cost less. On a GPU it is the other way round:
# every call is waited for.
_MOST_SCORES = 1 << 20


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
        if not grammars and (not logits.is_cpu or logits.numel() <= _MOST_SCORES) and is_argmax(metadata):
            return self._score_at_once(logits, trees, metadata)
        walks = [Walk(tree) for tree in trees]
        first_rows = torch.tensor([0, *(tree.num_nodes for tree in trees)]).cumsum(0)[:-1]
        logprobs: list[LogprobsTensors] = []
        walking = set(range(len(walks)))
        masks = {i: mask for i, mask_after in grammars.items() if (mask := mask_after(0)) is not None}
        while walking:
            rows = first_rows + torch.tensor([walk.node for walk in walks])
            generators = {i: g for i, g in metadata.generators.items() if i in walking and i not in discarded}
            out = self._sampler(
                logits=apply_masks(logits[async_tensor_h2d(rows, device=logits.device)], masks),
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
        out = self._sampler(logits=logits, sampling_metadata=replace(metadata, spec_token_ids=None))
        sampled = out.sampled_token_ids[:, 0].tolist()
        walks, start = [], 0
        for tree in trees:
            walks.append(accept(tree, sampled[start : start + tree.num_nodes]))
            start += tree.num_nodes
        return SamplerOutput(_stack_tokens(walks), None), walks


def is_argmax(metadata: SamplingMetadata) -> bool:
    """Whether vLLM's sampler takes the greatest logit of every row and does nothing else: plain greedy requests."""
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
