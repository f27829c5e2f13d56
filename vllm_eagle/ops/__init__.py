"""Triton kernels for GPUs, one per file, each with what it equals in plain torch.

Not run on a GPU yet: they are checked through Triton's interpreter (TRITON_INTERPRET=1), which runs them on CPU tensors, against
the references beside them. `vllm-eagle gpu-check` does the same on a GPU and times them.
"""
