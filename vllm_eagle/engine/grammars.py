"""Which requests with a grammar draft trees. Both engines ask."""

from vllm.config import VllmConfig


def grammars_follow_trees(vllm_config: VllmConfig) -> bool:
    """Whether constrained requests draft trees, with each node masked by its path; chains masked by vLLM otherwise.

    With a reasoning parser, where reasoning ends along a chain is vLLM's to say.
    """
    settings = vllm_config.structured_outputs_config
    return not settings.reasoning_parser or settings.enable_in_reasoning
