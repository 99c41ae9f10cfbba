"""Which rows make up which batch: length buckets, exact normalisation over an optimizer step, and a state to resume from."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from rlhf_lightning.errors import UserError


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
    not told where begins the next epoch. Which rows make an optimizer step depends on how many they are, not on how they
    are dealt out: a run may go on with other ranks, batches and accumulation of the same product.

    An epoch's order is an array of 8 bytes a row; its batches are made one by one.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        weights: Sequence[int] | np.ndarray,
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
            bucket_batches: So many optimizer steps' rows are sorted by length together: more of them, less padding; but
                steps of like rows are also steps of like content, which a small model notices. 1 leaves the order random.

        Raises:
            UserError: If there are fewer rows than ranks.
        """
        if len(lengths) < world_size:
            raise UserError(
                f"{len(lengths)} rows can't be shared by {world_size} ranks: give a split more rows, or fewer trainer.devices"
            )
        self.lengths, self.weights = np.asarray(lengths), np.asarray(weights)
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.bucket_batches = bucket_batches
        self.epoch = self.position = 0

    def __len__(self) -> int:
        size = self.batch_size * self.world_size * self.accumulate
        full, rest = divmod(len(self.lengths), size)
        joined = full > 0 and rest < self.world_size
        return full * self.accumulate + (0 if joined else len(self._batches(range(rest))))

    def rows_of_batches(self) -> list[int]:
        """Rows in each batch of an epoch, in order; the minimum over ranks."""
        size = self.batch_size * self.world_size * self.accumulate
        full, rest = divmod(len(self.lengths), size)
        steps = [size] * full
        if full > 0 and rest < self.world_size:
            steps[-1] += rest
        else:
            steps.append(rest)
        return [len(batch) // self.world_size for step in steps for batch in self._batches(range(step))]

    def __iter__(self) -> Iterator[BatchPlan]:
        if not self.shuffle:
            yield from self._plans(0, 0)
            return
        epoch, position = self.epoch, self.position
        self.epoch, self.position = self.epoch + 1, 0
        yield from self._plans(epoch, position)

    def begin(self, epoch: int, position: int) -> None:
        """Let the next iteration begin there: so many epochs, and batches of this one, lie behind."""
        self.epoch, self.position = epoch, position

    def _plans(self, epoch: int, position: int) -> Iterator[BatchPlan]:
        """The plans of an epoch from the batch at ``position`` on."""
        begun, done = divmod(position, self.accumulate)  # every step but the last has so many batches
        for step, rows in enumerate(self._steps(epoch, begun)):
            window, weight = self._batches(rows), self.weights[rows].sum().item()
            normalizer = weight / (self.world_size * self.accumulate)
            for batch in window[0 if step else done :]:
                yield BatchPlan(batch[self.rank :: self.world_size].tolist(), normalizer)

    def _batches(self, rows: np.ndarray | range) -> list[Any]:
        """The rows of an optimizer step, over all ranks, in batches; what is too small for all ranks joins what is before."""
        size = self.batch_size * self.world_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        if len(batches) > 1 and len(batches[-1]) < self.world_size:
            batches[-2:] = [rows[(len(batches) - 2) * size :]]
        return batches

    def _steps(self, epoch: int, begin: int) -> Iterator[np.ndarray]:
        """Rows of each optimizer step over all ranks: sorted by length within a bucket, in random order, the short one last."""
        rows, size = np.arange(len(self.lengths)), self.batch_size * self.world_size * self.accumulate
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        if self.shuffle:
            rows = torch.randperm(len(rows), generator=generator).numpy()
        bucket = size * self.bucket_batches if self.shuffle else len(rows)
        for start in range(0, len(rows), bucket):
            part = rows[start : start + bucket]
            rows[start : start + bucket] = part[np.argsort(self.lengths[part], kind="stable")]
        full = len(rows) // size
        order = torch.randperm(full, generator=generator).tolist() if self.shuffle else range(full)
        rest = rows[full * size :]
        joined = full > 0 and len(rest) < self.world_size
        for step in range(begin, full):
            own = rows[order[step] * size : (order[step] + 1) * size]
            yield np.concatenate([own, rest]) if joined and step == full - 1 else own
        if not joined and begin <= full:
            yield rest
