"""Attention over a paged context plus a tree: rows see their request's whole context and their ancestors in the tree.

- interface.py: what the engine asks of a device's attention. A new backend is a file of its own, on top of tree_impl.py.
- tree_impl.py: what all backends share: which rows go where. levels.py: passes of the head over tree levels.
- reference.py: plain torch, one request at a time; the oracle of the tests.
- cpu_cache.py: where vLLM's CPU kernels put a token's keys and values inside a block.
- cpu_kernel.py: the CPU kernel, on tensors.
- cpu.py: vLLM's CPU backend with tree rows.
- cuda.py: vLLM's CUDA backends: which for what, what they share, Triton's; flash.py: FlashAttention's; xformers.py: xformers'.
- mla.py: vLLM's Triton attention over latents, of targets with MLA.
"""
