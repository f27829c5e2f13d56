"""vLLM's own chains at T > 0 on CPUs, mended in the process that measures them, so that sampled trees have an opponent.

vLLM 0.32 spreads a batch's temperatures, top-k and top-p over its drafted tokens through a copy in 64-bit integers, and drops
the copy (`_expand_kernel_impl` in vllm/utils/cpu_triton_utils.py): logits are divided by uninitialised memory. The same mend as a
patch is patches/cpu_expand_kernel.patch.
"""

from collections.abc import Iterable

import torch

_PATCH = "patches/cpu_expand_kernel.patch"


def expand(
    output: torch.Tensor,  # [num_tokens], written
    values: torch.Tensor,  # [num_reqs]
    cu_num_tokens: torch.Tensor,  # [num_reqs], running sum of the requests' tokens
    replace_from: int,
    replace_to: int,
    MAX_NUM_TOKENS: int | None = None,  # noqa: N803  # the kernel's, which vLLM gives by name
) -> None:
    """Each request's value for all its tokens, `replace_to` in place of `replace_from`; arguments are those of vLLM's kernel."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    output.copy_(values.masked_fill(values == replace_from, replace_to).repeat_interleave(counts, output_size=len(output)))


def note(names: Iterable[str], temperature: float, in_process: bool) -> str | None:
    """What to say beside figures of these variants on a CPU; servers run in processes that are not mended."""
    if temperature == 0 or not any(name.startswith("vllm_chain") for name in names):
        return None
    if in_process:
        return f"vLLM's chains at T > 0 run with its _expand_kernel_impl mended in their process, as by {_PATCH}"
    return f"vLLM's chains at T > 0 are broken on CPUs, and servers are not mended: apply {_PATCH} first"


def mend_sampled_chains() -> None:
    """For all engines that this process starts from now on. Changes nothing on GPUs, where vLLM runs its kernel."""
    from vllm.utils import cpu_triton_utils

    cpu_triton_utils._expand_kernel_impl = expand
