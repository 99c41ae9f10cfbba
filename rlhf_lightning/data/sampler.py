"""Which rows make up which batch: length buckets, exact normalisation over an optimizer step, and a state to resume from."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler


class BatchPlan(NamedTuple):
    """The rows of one batch on one rank.

    Attributes:
        rows: Row numbers.
        normalizer: Mean weight (supervised tokens, or rows) of a micro-batch of the optimizer step that this batch is part
            of, over all ranks. A summed loss divided by it is, after Lightning has averaged over micro-batches and ranks,
            the sum over the whole step divided by its whole weight.
    """

    rows: list[int]
    normalizer: float


class BucketBatchSampler(Sampler[BatchPlan]):
    """Batches of rows of like length, sharded over ranks.

    In training the order is drawn from (seed, epoch), so that an iteration can begin at any batch of any epoch; one that is
    not told where begins the next epoch.
    """

    def __init__(
        self,
        lengths: list[int],
        weights: list[int],
        *,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        bucket_batches: int = 1,
    ) -> None:
        """Plan nothing yet.

        Args:
            lengths: Tokens in each row.
            weights: What each row adds to the denominator of the loss.
            batch_size: Rows a batch on one rank.
            shuffle: True for training. False gives the same batches every time, from the start every time.
            seed: Of the order.
            rank: Of this process.
            world_size: Number of processes.
            accumulate: Batches an optimizer step.
            bucket_batches: So many batches' rows are sorted by length together: more of them, less padding; but batches of
                like rows are also batches of like content, which a small model notices. 1 leaves the order random.

        Raises:
            ValueError: If there are fewer rows than ranks.
        """
        if len(lengths) < world_size:
            raise ValueError(f"{len(lengths)} rows can't be shared by {world_size} ranks")
        self.lengths, self.weights = lengths, weights
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.bucket_batches = bucket_batches
        self.epoch = self.position = 0

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.batch_size * self.world_size)
        # A tail with a row for every rank is a batch of its own; a smaller one joins the batch before it.
        return full + (rest >= self.world_size or full == 0)

    def __iter__(self) -> Iterator[BatchPlan]:
        if not self.shuffle:
            yield from self._plans(epoch=0)
            return
        plans = self._plans(self.epoch)[self.position :]
        self.epoch, self.position = self.epoch + 1, 0
        yield from plans

    def begin(self, epoch: int, position: int) -> None:
        """Let the next iteration begin there: so many epochs, and batches of this one, lie behind."""
        self.epoch, self.position = epoch, position

    def _plans(self, epoch: int) -> list[BatchPlan]:
        steps = self._global_batches(epoch)
        plans = []
        for start in range(0, len(steps), self.accumulate):
            window = steps[start : start + self.accumulate]
            weight = sum(self.weights[row] for batch in window for row in batch)
            normalizer = weight / (self.world_size * self.accumulate)
            plans += [BatchPlan(batch[self.rank :: self.world_size], normalizer) for batch in window]
        return plans

    def _global_batches(self, epoch: int) -> list[list[int]]:
        """Rows of each batch over all ranks: sorted by length within a bucket, batches in random order."""
        rows, size = list(range(len(self.lengths))), self.batch_size * self.world_size
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        if self.shuffle:
            rows = torch.randperm(len(rows), generator=generator).tolist()
        bucket = size * self.bucket_batches if self.shuffle else len(rows)
        batches = []
        for start in range(0, len(rows), bucket):
            ordered = sorted(rows[start : start + bucket], key=self.lengths.__getitem__)
            batches += [ordered[i : i + size] for i in range(0, len(ordered), size)]
        if len(batches) > 1 and len(batches[-1]) < self.world_size:
            batches[-2:] = [batches[-2] + batches[-1]]
        if self.shuffle:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return batches
