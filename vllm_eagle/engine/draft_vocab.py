"""The head's logits over the tokens that it can draft, and over no others.

vLLM multiplies with the target's whole LM head in EAGLE-1, and in EAGLE-3 spreads the logits of a reduced vocabulary over the
target's. Drafting ranks them at every level, so here they stay as few as they are (FR-Spec, arXiv 2502.14856).
"""

from typing import Any

import torch
from vllm.config import SpeculativeConfig, VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.engine import loaded
from vllm_eagle.heads import draft_vocab
from vllm_eagle.options.engine_args import MTP


class DraftLogits(torch.nn.Module):
    """Computes logits of the head, whose own modules are not registered here.

    Args:
        model: vLLM's head, loaded, which shares embedding and LM head with the target by now.
        token_ids: of the file beside an EAGLE-1 head, see `named_tokens`; None for the whole vocabulary.

    Attributes:
        token_ids: [draft_vocab] int64, the token of each logit; None where they are the target's vocabulary.
    """

    def __init__(self, model: Any, token_ids: list[int] | None, device: torch.device):
        super().__init__()
        self.token_ids: torch.Tensor | None = None
        self._model: tuple[Any] = (model,)
        self._rows: ReplicatedLinear | None = None
        offsets = getattr(model, "draft_id_to_target_id", None)
        if offsets is not None:
            self.token_ids = torch.arange(len(offsets), device=device) + offsets
        elif token_ids is not None:
            self.token_ids = torch.tensor(token_ids, device=device)
            self._rows = _rows_of(model.lm_head, self.token_ids)
            processor = model.logits_processor
            self._finish = LogitsProcessor(len(token_ids), None, processor.scale, logits_as_input=True, soft_cap=processor.soft_cap)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> [rows, draft_vocab]."""
        if self._rows is not None:
            return self._finish(None, self._rows(hidden))
        (model,) = self._model
        if self.token_ids is not None:
            return model.logits_processor(model.lm_head, hidden)
        return model.compute_logits(hidden)


def logits_of(head: Any, target: Any, config: VllmConfig, options: TreeConfig, device: torch.device) -> DraftLogits:
    """What the head drafts with, once it is seen that all of it is there.

    Raises:
        ValueError: something is missing, or rows of the target's LM head cannot be taken.
    """
    if config.speculative_config.method == MTP:  # which has all that it needs in the target's checkpoint
        loaded.see_module(config)
        return DraftLogits(head, None, device)
    loaded.complete(head, target, config)
    return DraftLogits(head, named_tokens(config) if options.draft_vocab else None, device)


def named_tokens(config: VllmConfig) -> list[int] | None:
    """The draft vocabulary that lies beside an EAGLE-1 head; None if there is none.

    Raises:
        ValueError: it is not one for this target.
    """
    spec: SpeculativeConfig = config.speculative_config
    head = spec.draft_model_config
    if spec.method != "eagle" or head is None:
        return None
    found = get_hf_file_to_dict(draft_vocab.FILE, head.model, head.revision)
    return None if found is None else draft_vocab.parse(found, config.model_config.get_vocab_size())


def _rows_of(lm_head: ParallelLMHead, token_ids: torch.Tensor) -> ReplicatedLinear:
    """Rows of the target's LM head as a layer, the same on every rank of a tensor-parallel group."""
    weight, own = lm_head.weight.data, lm_head.shard_indices
    if not isinstance(lm_head.quant_method, UnquantizedEmbeddingMethod):
        raise ValueError("the target's LM head is quantized, so rows of it cannot be taken for drafting; set draft_vocab to false")
    here = (token_ids >= own.org_vocab_start_index) & (token_ids < own.org_vocab_end_index)
    rows = weight[(token_ids - own.org_vocab_start_index).where(here, 0)] * here[:, None].to(weight.dtype)
    layer = ReplicatedLinear(weight.shape[1], len(token_ids), bias=False, params_dtype=weight.dtype, return_bias=False)
    layer.weight.data = tensor_model_parallel_all_reduce(rows) if lm_head.tp_size > 1 else rows
    layer.quant_method.process_weights_after_loading(layer)
    return layer
