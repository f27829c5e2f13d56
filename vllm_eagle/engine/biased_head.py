"""EAGLE-1 heads whose `fc` has a bias, as SafeAILab trained them for LLaMA-2 and Vicuna.

vLLM's class builds `fc` without one and has no setting for it. This subclass puts the biased layer in its place before weights are
loaded and before anything is compiled; vLLM's compiled forward pass calls whatever `fc` is. `plugin.register` makes the class known
under a name of its own, which `vllm-eagle convert` writes into config.json; vLLM's classes stay as they are.
"""

from collections.abc import Iterable

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.llama_eagle import EagleLlamaForCausalLM
from vllm.model_executor.models.utils import get_draft_quant_config, maybe_prefix


class EagleBiasedLlamaForCausalLM(EagleLlamaForCausalLM):
    """vLLM's EAGLE-1 head with `fc.bias`: fc(cat(embedding, feature)) = weight @ input + bias."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.model.fc = ReplicatedLinear(
            input_size=self.config.hidden_size * 2,
            output_size=self.config.hidden_size,
            bias=True,
            params_dtype=vllm_config.model_config.dtype,
            quant_config=get_draft_quant_config(vllm_config),
            prefix=maybe_prefix(prefix, "model.fc"),
            return_bias=False,
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load the head.

        Raises:
            ValueError: the checkpoint has no fc.bias; vLLM would leave its memory as it is.
        """
        names = set()

        def seen() -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                names.add(name)
                yield name, tensor

        super().load_weights(seen())
        if "fc.bias" not in names:
            raise ValueError("the head's config.json names a class with fc.bias, the weights have none; convert the head again")
