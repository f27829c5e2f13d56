"""Score the nodes of all trees: sample along each tree with vLLM's own sampler and keep the path.

The target pass gave one row of logits per node. Depth by depth, the rows of the nodes where the walks stand go through vLLM's
`Sampler` as one batch with one row per request, exactly the call that plain decoding makes for that position: the same sampling
metadata, penalties over the output so far, logits processors, and the next noise of the request's generator. Nothing is
approximated or handled twice, so whatever the sampler knows is exact under trees.

Where it looks at nothing but a row, its request's temperature, top-k and top-p, and its noise, one call samples after all nodes,
and the walk looks up what was sampled. The sampler draws the noise of a row from a generator, so each node is given one of its own,
in the state that belongs to its depth (node_noise.py). On a GPU that saves waiting after every depth. On a CPU it is done for
greedy requests: noise and filters for nodes off the way cost more there than the calls that are saved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitBiasLogitsProcessor, MinPLogitsProcessor, MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from vllm_eagle.algorithm.accept import Walk, accept
from vllm_eagle.algorithm.node_noise import Draw, node_generators
from vllm_eagle.algorithm.noise import draw_seed, draws_seeds
from vllm_eagle.algorithm.tree import DraftTree, depths_of
from vllm_eagle.engine.v1.grammar import MaskAfter, apply_masks

PADDING = -1  # what vLLM ignores in a row of sampled tokens
_MOST_SCORES = 1 << 20  # in one call for all nodes on CPU; with more, calls for the nodes on the way alone cost less


class EagleTreeScorer:
    """Turns logits of tree nodes into emitted tokens."""

    def __init__(self, sampler: Sampler, most_rows: int):
        """`most_rows`: for so many rows at once there is memory to draw noise and sort logits."""
        self._sampler = sampler
        self._most_rows = most_rows

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
        if not grammars and self._at_once_is_cheap(logits, metadata.all_greedy) and is_row_wise(metadata):
            return self._score_at_once(logits, trees, metadata, discarded)
        walks = [Walk(tree) for tree in trees]
        starts = _starts(trees)
        logprobs: list[LogprobsTensors] = []
        walking = set(range(len(walks)))
        masks = {i: mask for i, mask_after in grammars.items() if (mask := mask_after(0)) is not None}
        while walking:
            rows = torch.from_numpy(starts[:-1] + [walk.node for walk in walks])
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

    def _at_once_is_cheap(self, logits: torch.Tensor, greedy: bool) -> bool:
        """Also in memory."""
        if logits.is_cpu:
            return greedy and logits.numel() <= _MOST_SCORES
        return greedy or len(logits) <= self._most_rows

    def _score_at_once(
        self, logits: torch.Tensor, trees: Sequence[DraftTree], metadata: SamplingMetadata, discarded: set[int]
    ) -> tuple[SamplerOutput, list[Walk]]:
        starts = _starts(trees).tolist()
        drawing = {} if metadata.all_greedy else {i: g for i, g in metadata.generators.items() if i not in discarded}
        own: dict[int, torch.Generator] = {}  # by row of logits
        if drawing:
            draw = self._draw(logits)
            for (i, generator), depths in zip(drawing.items(), depths_of([trees[i] for i in drawing]), strict=True):
                own |= dict(enumerate(node_generators(generator, depths.tolist(), draw), starts[i]))
        out = self._sampler(logits=logits, sampling_metadata=_per_node(metadata, trees, own))
        sampled = out.sampled_token_ids[:, 0].tolist()
        walks = [accept(tree, sampled[start:end]) for tree, start, end in zip(trees, starts, starts[1:], strict=False)]
        for i, generator in drawing.items():
            generator.set_state(own[starts[i] + walks[i].node].get_state())
        return SamplerOutput(_stack_tokens(walks), None), walks

    def _draw(self, logits: torch.Tensor) -> Draw:
        """What the sampler draws for a row of noise: on CPU the seed of a hash (noise.py), else the row (noise_rows.py)."""
        exact: bool = self._sampler.use_fp64_gumbel
        if draws_seeds(logits.device, exact):
            return draw_seed
        row = torch.empty(logits.shape[-1], dtype=torch.float64 if exact else torch.float32, device=logits.device)
        return lambda generator: row.exponential_(generator=generator)


def _starts(trees: Sequence[DraftTree]) -> np.ndarray:
    """First rows of trees, and the number of rows: [len(trees) + 1] int64."""
    return np.cumsum([0, *(tree.num_nodes for tree in trees)])


def _per_node(metadata: SamplingMetadata, trees: Sequence[DraftTree], generators: dict[int, torch.Generator]) -> SamplingMetadata:
    """What a node's row needs of its request's, where all nodes are sampled after at once."""
    found = replace(metadata, generators=generators, spec_token_ids=None)
    if metadata.all_greedy:
        return found
    device = metadata.temperature.device
    request = async_tensor_h2d(np.repeat(np.arange(len(trees)), [tree.num_nodes for tree in trees]), device=device)
    per_request = {name: getattr(metadata, name) for name in ("temperature", "top_k", "top_p")}
    return replace(found, **{name: values[request] for name, values in per_request.items() if values is not None})


def is_row_wise(metadata: SamplingMetadata) -> bool:
    """Whether vLLM's sampler looks at nothing but a row of logits, its request's temperature, top-k and top-p, and its noise."""
    thinking = metadata.thinking_budget_state_holder
    return (
        metadata.no_penalties
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
        and (
            metadata.all_greedy
            or all(
                isinstance(processor, MinPLogitsProcessor) and not processor.min_p_count
                for processor in metadata.logitsprocs.argmax_invariant
            )
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
