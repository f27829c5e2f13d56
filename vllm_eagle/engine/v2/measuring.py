"""What passes of target and head cost on this machine, measured at start, for the budget."""

from typing import Any

import torch
from vllm.logger import init_logger

from vllm_eagle.budget.budget import Budget
from vllm_eagle.engine import costs

logger = init_logger(f"vllm.{__name__}")  # below "vllm", so that vLLM shows it with its own lines


@torch.inference_mode()
def measured(runner: Any) -> Budget:
    """Of an EagleTreeRunner that is warmed up. Ranks run the same passes, and all get the first one's numbers."""
    config, speculator = runner.tree_config, runner.speculator
    most_nodes = min(runner.max_num_tokens, runner.max_num_reqs * (1 + config.num_draft_tokens))

    def ended() -> None:
        if runner.device.type != "cpu":
            torch.accelerator.synchronize()

    def target_pass(num_tokens: int) -> None:
        # Of different tokens: experts are read for those that ask for them, and tokens that are all alike ask for the same few.
        hidden, _ = runner._dummy_run(num_tokens, randomize_inputs=True)
        if runner.lora_config is None:  # with adapters, logits want a real batch
            runner.model.compute_logits(hidden[: min(num_tokens, most_nodes)])  # of the rest of a prompt there are none
        ended()

    def committed_pass(num_tokens: int) -> None:
        speculator.run_head(num_tokens, None)
        ended()

    def head_pass(num_tokens: int) -> None:
        speculator.logits(speculator.run_head(num_tokens, None)[0])
        ended()

    speculator.is_measuring_target = True
    try:
        target = costs.measure(target_pass, runner.max_num_tokens)  # there are prompts in passes, too
    finally:
        speculator.is_measuring_target = False
    head, committed = costs.measure(head_pass, most_nodes), costs.measure(committed_pass, most_nodes)
    target, head, committed = (costs.agreed(curve) for curve in (target, head, committed))
    for name, curve in (("target", target), ("head", head)):
        logger.info("Draft trees: milliseconds of a pass of the %s by tokens in it: %s", name, curve)
    return Budget(target, head, config.num_draft_tokens, config.depth_limit, committed)
