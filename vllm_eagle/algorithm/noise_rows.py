"""Sampling noise per position where vLLM's sampler fills a whole row from a request's generator: with `use_fp64_gumbel`.

There vLLM takes `argmax(p / q)` with q a row of exponential noise, one number per token. That is `argmax(logits / T - log q)`, and
`-log q` follows the Gumbel distribution: the same rule as on CPU (noise.py) with another source. A request's generator is a stream
of rows, one per emitted token: a step samples once at every depth that a request's walk reaches, whatever was drafted, so tokens
with trees are those without. Looking ahead in the stream tells the drafter the coming rows.

Pure torch: generators of GPUs and of CPUs keep their state alike, so the tests run on CPU.
"""

from collections.abc import Sequence

import torch


class NoiseRows:
    """The coming rows of some generators, which are left as they were found; one position after the other, as drafting goes.

    Costs one launch per generator and position. Rows are drawn when they are asked for: drafting often ends before its last level.
    """

    def __init__(self, generators: Sequence[torch.Generator], vocab_size: int, dtype: torch.dtype = torch.float32):
        self._generators, self._vocab_size = generators, vocab_size
        self._dtype = dtype  # that of vLLM's row: another one would be drawn differently
        self._states = [generator.get_state() for generator in generators]  # after the last row that was drawn
        self._depth = 0

    def at(self, depth: int) -> torch.Tensor:  # [len(generators), vocab_size] float32, on the generators' device
        """Gumbel noise of the position so many tokens ahead: 1 is the next one.

        Raises:
            ValueError: the depth is not greater than the one asked for before.
        """
        if depth <= self._depth:
            raise ValueError(f"noise comes position by position: depth {depth} was asked for after depth {self._depth}")
        rows = torch.empty(len(self._generators), self._vocab_size, dtype=self._dtype, device=self._generators[0].device)
        while self._depth < depth:
            for i, (generator, row) in enumerate(zip(self._generators, rows, strict=True)):
                self._states[i] = _fill(row, generator, self._states[i])
            self._depth += 1
        return rows.log_().neg_().float()


def _fill(row: torch.Tensor, generator: torch.Generator, state: torch.Tensor) -> torch.Tensor:
    """Fill a row as vLLM's sampler would with the generator in `state`; returns the state after it."""
    found = generator.get_state()
    generator.set_state(state)
    try:
        row.exponential_(generator=generator)
        return generator.get_state()
    finally:
        generator.set_state(found)
