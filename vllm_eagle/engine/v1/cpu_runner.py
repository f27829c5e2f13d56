"""The model runner with draft trees on CPU."""

from typing import Any

import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_eagle import native
from vllm_eagle.algorithm import compact
from vllm_eagle.algorithm.verify import TreeBatch
from vllm_eagle.engine.v1.runner import EagleTreeRunner


class EagleTreeCPUModelRunner(EagleTreeRunner, CPUModelRunner):
    """vLLM's CPU model runner, verifying trees."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As `EagleTreeRunner.load_model`, and make sure of the C++ operators."""
        super().load_model(*args, **kwargs)
        native.runs()  # built now if need be, not while the first request waits

    def _move_accepted(self, batch: TreeBatch, paths: list[list[int]]) -> None:
        index, sources, targets = compact.moves(paths, batch.context_lens.tolist())
        rows = batch.req_indices[index]
        for gid, layers in self._target_layers():
            block_table, block_size = self.input_batch.block_table[gid].get_numpy_array(), layers[0].kv_cache.shape[2]
            slots = (torch.from_numpy(compact.slots(block_table, rows, x, block_size)) for x in (sources, targets))
            layers[0].impl.move_slots(layers, *slots)
