"""The sampler: every row once over all ranks, the step's exact normaliser, and resuming where it stopped."""

from itertools import islice

import pytest
import torch

from rlhf_lightning.data.sampler import BucketBatchSampler
from rlhf_lightning.errors import UserError


def lengths_of(rows, seed=0):
    return torch.randint(3, 200, (rows,), generator=torch.Generator().manual_seed(seed)).tolist()


def sampler(rows=43, *, weights=None, shuffle=True, **kwargs):
    lengths = lengths_of(rows)
    return BucketBatchSampler(lengths, weights or lengths, batch_size=4, shuffle=shuffle, **kwargs)


def rows_of(plans):
    return [plan.rows for plan in plans]


@pytest.mark.parametrize("order", [{"shuffle": True}, {"shuffle": True, "bucket_batches": 50}, {"shuffle": False}])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("rows", [3, 5, 12, 13, 24, 25, 26, 43, 700, 1201])
def test_every_row_comes_once_an_epoch_over_all_ranks(rows, world_size, order):
    per_rank = [rows_of(sampler(rows, **order, rank=rank, world_size=world_size)) for rank in range(world_size)]
    seen = [row for rank in per_rank for batch in rank for row in batch]
    assert sorted(seen) == list(range(rows))
    counts = {len(rank) for rank in per_rank}
    assert counts == {len(sampler(rows, **order, world_size=world_size))}
    assert all(1 <= len(batch) <= 5 for rank in per_rank for batch in rank)
    assert sum(len(batch) != 4 for batch in per_rank[0]) <= 1


def test_fewer_rows_than_ranks_are_refused():
    with pytest.raises(UserError, match=r"2 rows.*3 ranks"):
        sampler(2, world_size=3)


def test_the_order_is_a_function_of_seed_and_epoch():
    one, same, other = sampler(seed=1), sampler(seed=1), sampler(seed=2)
    epochs = [rows_of(one) for _ in range(3)]
    assert epochs == [rows_of(same) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != rows_of(other)


def test_a_batch_is_not_always_made_of_the_same_rows():
    one = sampler(1000, bucket_batches=50)
    first, second = ({frozenset(batch) for batch in rows_of(one)} for _ in range(2))
    assert len(first & second) < 0.1 * len(first)


def test_short_and_long_batches_are_mixed_over_the_epoch():
    batches = rows_of(sampler(200, bucket_batches=50))
    lengths = lengths_of(200)
    means = [sum(lengths[r] for r in batch) / len(batch) for batch in batches]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 7, 10, 11])
def test_a_new_process_goes_on_with_exactly_the_rest(stop, epoch):
    whole = sampler(seed=3)
    assert len(whole) == 11
    expected = [list(whole) for _ in range(4)]
    second = sampler(seed=3)
    second.begin(epoch, stop)
    assert list(second) == expected[epoch][stop:]
    assert list(second) == expected[epoch + 1]


def steps_of(*, rows, batch_size, world_size, accumulate, bucket_batches):
    """The rows of each optimizer step of an epoch, over all ranks."""
    lengths = lengths_of(rows)
    ranks = [
        BucketBatchSampler(
            lengths,
            lengths,
            batch_size=batch_size,
            shuffle=True,
            rank=rank,
            world_size=world_size,
            accumulate=accumulate,
            bucket_batches=bucket_batches,
        )
        for rank in range(world_size)
    ]
    plans = [rows_of(rank) for rank in ranks]
    windows = range(0, len(plans[0]), accumulate)
    return [sorted(row for rank in plans for batch in rank[at : at + accumulate] for row in batch) for at in windows]


@pytest.mark.parametrize("bucket_batches", [1, 4])
@pytest.mark.parametrize("rows", [8, 96, 100, 103])
def test_the_rows_of_each_step_are_the_same_however_they_are_dealt_out(rows, bucket_batches):
    """Batch size x ranks x accumulation is 8: a run may go on with other factors."""
    factors = [(8, 1, 1), (4, 2, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4), (1, 1, 8)]
    one, *others = [
        steps_of(rows=rows, batch_size=b, world_size=w, accumulate=a, bucket_batches=bucket_batches)
        for b, w, a in factors
    ]
    assert len(one) == -(-rows // 8)
    for factor, other in zip(factors[1:], others, strict=True):
        whole = (
            len(one) if rows % 8 == 0 or rows % 8 >= factor[1] else len(one) - 2
        )  # a rest too small for all ranks joins
        assert other[:whole] == one[:whole], factor


def test_without_shuffling_every_pass_is_the_same_and_from_the_start():
    one = sampler(shuffle=False)
    whole = rows_of(one)
    list(islice(iter(one), 4))
    assert rows_of(one) == whole
    one.begin(2, 5)
    assert rows_of(one) == whole


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("rows", [24, 43, 25])
def test_averaging_over_ranks_and_micro_batches_gives_the_mean_of_the_step(rows, accumulate, world_size):
    """What DDP (mean over ranks) and accumulation (division by the full count) make of sum / normaliser."""
    weights = [n // 2 + 1 for n in lengths_of(rows, seed=9)]
    losses = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(8)).tolist()  # a token
    plans = [
        list(sampler(rows, weights=weights, rank=rank, world_size=world_size, accumulate=accumulate))
        for rank in range(world_size)
    ]
    for start in range(0, len(plans[0]), accumulate):
        window = [plan for rank in plans for plan in rank[start : start + accumulate]]
        step_rows = [row for plan in window for row in plan.rows]
        sums = [sum(losses[row] * weights[row] for row in plan.rows) / plan.normalizer for plan in window]
        total = sum(losses[row] * weights[row] for row in step_rows)
        assert sum(sums) / accumulate / world_size == pytest.approx(total / sum(weights[row] for row in step_rows))
    if (rows, accumulate, world_size) in {(43, 4, 1), (43, 4, 2), (25, 4, 3)}:
        assert len(plans[0]) % accumulate != 0  # here the last window is an incomplete one


def padding(batches, lengths):
    return sum(max(lengths[r] for r in batch) * len(batch) - sum(lengths[r] for r in batch) for batch in batches)


@pytest.mark.parametrize("order", [{"shuffle": True, "bucket_batches": 50}, {"shuffle": False}])
def test_buckets_hold_far_less_padding_than_random_batches(order):
    rows = 1000
    lengths = lengths_of(rows)
    random = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).split(4)
    bucketed = padding(rows_of(sampler(rows, **order)), lengths)
    assert bucketed < 0.1 * padding([batch.tolist() for batch in random], lengths)


def test_without_buckets_batches_are_random_ones():
    rows = 1000
    lengths = lengths_of(rows, seed=2)
    random = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).split(4)
    plain = BucketBatchSampler(lengths, lengths, batch_size=4, shuffle=True, bucket_batches=1)
    expected = padding([batch.tolist() for batch in random], lengths)
    assert padding(rows_of(plain), lengths) == pytest.approx(expected, rel=0.1)
