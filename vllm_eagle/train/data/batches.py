"""Batches of whole examples of similar length, the same in every run, for each of several processes.

An epoch shuffles the examples, sorts them by length within chunks of about 32 batches, cuts the chunks into batches and shuffles
those. Every epoch has the same number of batches on every process: an epoch that comes out with fewer splits its largest ones,
one that comes out with more takes larger chunks, which waste less padding.
"""

import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from vllm_eagle.train.data.examples import Example

CHUNK_BATCHES = 32


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples padded on the right to the longest one. Attention is causal, so padding needs no attention mask."""

    token_ids: torch.Tensor  # [batch, width] int64, 0 on padding
    loss_mask: torch.Tensor  # [batch, width] bool, False on padding
    lengths: torch.Tensor  # [batch] int64
    keys: list[int]  # index of each example, for caches of features


class Batches:
    """Deterministic batches of whole examples, similar lengths together, for one of `world` processes.

    Every example comes once per epoch, counted over all processes. Only where nearly every batch holds a single example can
    their number fail to divide by `world`; then fewer than `world` batches, other ones in every epoch, are left out.

    Args:
        examples: the same, in the same order, on every process.
        batch_tokens: at least batch * width, padding included; a longer example gets a batch of its own.
        seed: of the order.
        rank: this process, from 0.
        world: number of processes.

    Raises:
        ValueError: nothing to make batches of, or an argument out of range.
    """

    def __init__(self, examples: Sequence[Example], batch_tokens: int, seed: int, rank: int = 0, world: int = 1):
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank}; with {world} processes it runs from 0 to {world - 1}")
        if len(examples) < world:
            raise ValueError(f"{len(examples)} examples cannot feed {world} processes; bring more data or use fewer processes")
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens is {batch_tokens}; it must be at least 1")
        self._examples, self._batch_tokens, self._seed = examples, batch_tokens, seed
        self._rank, self._world = rank, world
        self._lengths = [len(example.token_ids) for example in examples]
        self._chunk = max(1, CHUNK_BATCHES * batch_tokens * len(examples) // sum(self._lengths))
        # Cutting all examples sorted at once gives the same number in every epoch, so no epoch needs more than the larger one.
        whole = len(self._cut(self._order(0), len(examples)))
        num_batches = max(whole, len(self._cut(self._order(0), self._chunk)))
        rounded = -(-num_batches // world) * world
        self._total = rounded if rounded <= len(examples) else len(examples) // world * world

    def num_batches(self) -> int:
        """Batches per epoch of this process, the same on every process and in every epoch."""
        return self._total // self._world

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from the `start`-th on. The order depends on the seed and `number` alone."""
        for indices in self._plan(number)[self._rank :: self._world][start:]:
            yield self._build(indices)

    def _plan(self, number: int) -> list[list[int]]:
        """Indices of the examples in every batch of an epoch, for all processes."""
        order, chunk = self._order(number), self._chunk
        batches = self._cut(order, chunk)
        while len(batches) > self._total and chunk < len(order):
            chunk *= 2
            batches = self._cut(order, chunk)
        heap = [(-len(indices), indices) for indices in batches]
        heapq.heapify(heap)
        while len(heap) < self._total:
            _, largest = heapq.heappop(heap)
            for half in (largest[: len(largest) // 2], largest[len(largest) // 2 :]):
                heapq.heappush(heap, (-len(half), half))
        batches = [indices for _, indices in heap]
        random.Random(f"batches {self._seed} {number}").shuffle(batches)
        return batches[: self._total]

    def _order(self, number: int) -> list[int]:
        order = list(range(len(self._examples)))
        random.Random(f"examples {self._seed} {number}").shuffle(order)
        return order

    def _cut(self, order: list[int], chunk: int) -> list[list[int]]:
        batches = []
        for first in range(0, len(order), chunk):
            indices = sorted(order[first : first + chunk], key=self._lengths.__getitem__, reverse=True)
            at = 0
            while at < len(indices):
                size = max(1, self._batch_tokens // self._lengths[indices[at]])  # the first is the longest
                batches.append(indices[at : at + size])
                at += size
        return batches

    def _build(self, indices: list[int]) -> Batch:
        lengths = torch.tensor([self._lengths[i] for i in indices])
        token_ids = torch.zeros(len(indices), int(lengths.max()), dtype=torch.int64)
        loss_mask = torch.zeros(token_ids.shape, dtype=torch.bool)
        for row, i in enumerate(indices):
            example = self._examples[i]
            token_ids[row, : len(example.token_ids)] = example.token_ids
            loss_mask[row, : len(example.loss_mask)] = example.loss_mask
        return Batch(token_ids, loss_mask, lengths, list(indices))
