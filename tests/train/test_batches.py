"""Batches: every example once, within the token bound, the same on every process and after a restart."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_eagle.train.data.batches import Batch, Batches
from vllm_eagle.train.data.examples import Example

LENGTHS = st.lists(st.integers(3, 60), min_size=1, max_size=200)


def examples_of(lengths: list[int]) -> list[Example]:
    """Tokens tell the example: 1000 * index + position, shifted by one so that none looks like padding."""
    made = []
    for i, length in enumerate(lengths):
        made.append(Example(1 + 1000 * i + torch.arange(length, dtype=torch.int32), torch.arange(length) % 3 == i % 3))
    return made


def same(one: Batch, other: Batch) -> bool:
    tensors = zip((one.token_ids, one.loss_mask, one.lengths), (other.token_ids, other.loss_mask, other.lengths), strict=True)
    return one.keys == other.keys and all(torch.equal(a, b) for a, b in tensors)


@given(LENGTHS, st.integers(1, 300), st.integers(1, 5), st.integers(0, 3))
def test_every_example_comes_once_per_epoch(lengths: list[int], batch_tokens: int, world: int, number: int) -> None:
    if len(lengths) < world:
        return
    made = [Batches(examples_of(lengths), batch_tokens, 7, rank, world) for rank in range(world)]
    epochs = [list(batches.epoch(number)) for batches in made]
    assert {len(epoch) for epoch in epochs} == {made[0].num_batches()}
    keys = [key for epoch in epochs for batch in epoch for key in batch.keys]
    assert len(keys) == len(set(keys))
    # Some are left out only where splitting batches further could not help: hardly more examples than batches.
    missing = set(range(len(lengths))) - set(keys)
    assert not missing or world > 1
    assert not missing or len(lengths) < (made[0].num_batches() + 1) * world


@given(LENGTHS, st.integers(1, 300), st.integers(0, 3))
def test_batches_hold_their_examples_and_keep_the_bound(lengths: list[int], batch_tokens: int, number: int) -> None:
    examples = examples_of(lengths)
    for batch in Batches(examples, batch_tokens, 0).epoch(number):
        assert batch.token_ids.numel() <= batch_tokens or len(batch.keys) == 1
        assert batch.token_ids.shape == batch.loss_mask.shape == (len(batch.keys), int(batch.lengths.max()))
        assert (batch.token_ids.dtype, batch.loss_mask.dtype, batch.lengths.dtype) == (torch.int64, torch.bool, torch.int64)
        for row, key in enumerate(batch.keys):
            length = int(batch.lengths[row])
            assert torch.equal(batch.token_ids[row, :length], examples[key].token_ids.long())
            assert torch.equal(batch.loss_mask[row, :length], examples[key].loss_mask)
            assert not batch.token_ids[row, length:].any()
            assert not batch.loss_mask[row, length:].any()


@given(LENGTHS, st.integers(20, 300), st.integers(0, 20))
def test_an_epoch_continues_where_it_stopped(lengths: list[int], batch_tokens: int, start: int) -> None:
    examples = examples_of(lengths)
    whole = list(Batches(examples, batch_tokens, 3).epoch(2))
    rest = list(Batches(examples, batch_tokens, 3).epoch(2, start=start))
    assert len(rest) == max(0, len(whole) - start)
    assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_skipped_batches_are_not_built() -> None:
    class Counting(list[Example]):
        reads = 0

        def __getitem__(self, index: int) -> Example:  # type: ignore[override]
            self.reads += 1
            return super().__getitem__(index)

    examples = Counting(examples_of([5] * 100))
    batches = Batches(examples, 50, 0)
    examples.reads = 0
    [last] = batches.epoch(0, start=batches.num_batches() - 1)
    assert examples.reads == len(last.keys)


def test_epochs_and_seeds_differ_in_order_and_in_company() -> None:
    lengths = random.Random(0).choices(range(5, 50), k=2000)
    examples = examples_of(lengths)
    groups = [
        [frozenset(batch.keys) for batch in Batches(examples, 200, seed).epoch(number)] for seed, number in ((0, 0), (0, 1), (1, 0))
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert len(set(groups[i]) & set(groups[j])) < len(groups[i]) // 10


@pytest.mark.parametrize("world", [1, 4])
def test_every_epoch_has_the_same_number_of_batches_and_all_examples(world: int) -> None:
    """With one process no slack from rounding hides an epoch that would come out with more batches."""
    lengths = random.Random(1).choices(range(3, 400), k=3000)
    made = [Batches(examples_of(lengths), 1000, 0, rank, world) for rank in range(world)]
    for number in range(12):
        epochs = [list(batches.epoch(number)) for batches in made]
        assert {len(epoch) for epoch in epochs} == {made[0].num_batches()}
        assert sorted(key for epoch in epochs for batch in epoch for key in batch.keys) == list(range(3000))


def test_similar_lengths_go_together_and_widths_do_not_run_in_order() -> None:
    lengths = [int(random.Random(i).lognormvariate(4, 0.8)) + 3 for i in range(5000)]
    epoch = list(Batches(examples_of(lengths), 4096, 0).epoch(0))
    used = sum(int(batch.lengths.sum()) for batch in epoch)
    padded = sum(batch.token_ids.numel() for batch in epoch)
    assert used / padded > 0.9
    widths = [batch.token_ids.shape[1] for batch in epoch]
    half = len(widths) // 2
    assert 0.7 < sum(widths[:half]) / sum(widths[half : 2 * half]) < 1.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"rank": 2, "world": 2}, "it runs from 0 to 1"),
        ({"rank": -1}, "rank is -1"),
        ({"world": 9}, "3 examples cannot feed 9 processes"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(examples_of([4, 5, 6]), **({"batch_tokens": 10, "seed": 0} | arguments))
