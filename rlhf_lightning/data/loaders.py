"""Data loaders over tokenized rows, and where in a run they are."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from rlhf_lightning.data.collate import PlannedRows
from rlhf_lightning.data.limits import numbers
from rlhf_lightning.data.rows import INDEX
from rlhf_lightning.data.sampler import BucketBatchSampler
from rlhf_lightning.errors import UserError


@dataclass(frozen=True)
class Placement:
    """Where in a distributed run this process stands, and how many batches make an optimizer step."""

    rank: int = 0
    world_size: int = 1
    accumulate: int = 1


def placement(trainer: Any) -> Placement:
    """Read it off a Lightning trainer; the defaults where there is none.

    Raises:
        UserError: If Lightning would shard the rows a second time.
    """
    if trainer is None:
        return Placement()
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise UserError("the data modules shard rows by rank themselves; set trainer.use_distributed_sampler to false")
    share = trainer.distributed_sampler_kwargs  # ranks under tensor parallelism have the same rows
    if share is None:
        return Placement(accumulate=trainer.accumulate_grad_batches)
    return Placement(share["rank"], share["num_replicas"], trainer.accumulate_grad_batches)


def whereabouts(trainer: Any) -> tuple[int, int]:
    """How many epochs, and how many batches of the present one, a run in training has behind it; else (0, 0).

    Counted by Lightning's loops, whose state is in every checkpoint: a loader needs none of its own, and what its workers
    have prepared beyond the batch that is trained on is of no interest.
    """
    return (trainer.current_epoch, trainer.fit_loop.batch_idx + 1) if trainer.training else (0, 0)


class RowLoader(DataLoader[Any]):
    """A loader that asks where to begin when the first batch of an iteration is wanted.

    Not earlier: Lightning makes iterators before it has read the checkpoint.

    Attributes:
        where: Gives epoch and batch; None for one epoch after the other.
    """

    where: Callable[[], tuple[int, int]] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches, from there to the end of the epoch."""
        if self.where is not None and isinstance(self.batch_sampler, BucketBatchSampler):
            self.batch_sampler.begin(*self.where())
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing to remember; that there is this method tells Lightning that the loader can begin anywhere."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do."""


def make_loader(
    rows: Dataset,
    collate: Callable[..., Any],
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    place: Placement,
    num_workers: int,
    weights: Sequence[int] | np.ndarray,
    bucket_batches: int,
) -> RowLoader:
    """A loader over one split.

    Args:
        rows: Tokenized rows with a ``length``.
        collate: Makes a typed batch.
        batch_size: Rows a batch on one rank.
        shuffle: True for training.
        seed: Of the order.
        place: Rank, world size, accumulation.
        num_workers: Processes that collate.
        weights: What each row adds to the denominator of the loss.
        bucket_batches: Number of optimizer steps whose rows are sorted by length together.
    """
    sampler = BucketBatchSampler(
        numbers(rows, "length"),
        weights,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        rank=place.rank,
        world_size=place.world_size,
        accumulate=place.accumulate,
        bucket_batches=bucket_batches,
    )
    return RowLoader(
        PlannedRows(rows.remove_columns([name for name in ("length", INDEX) if name in rows.column_names])),  # type: ignore[arg-type]
        batch_sampler=sampler,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=num_workers,
        # Its own generator: else making an iterator would draw from the global one, and a resumed run differ.
        generator=torch.Generator().manual_seed(seed),
    )
