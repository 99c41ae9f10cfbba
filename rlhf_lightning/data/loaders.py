"""Stateful data loaders over tokenized rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from rlhf_lightning.data.collate import PlannedRows
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
    return Placement(trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches)


def make_loader(
    rows: Dataset,
    collate: Callable[..., Any],
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    place: Placement,
    num_workers: int,
    weights: list[int],
    bucket_batches: int,
) -> StatefulDataLoader:
    """A loader that knows where it is.

    Args:
        rows: Tokenized rows with a ``length``.
        collate: Makes a typed batch.
        batch_size: Rows a batch on one rank.
        shuffle: True for training.
        seed: Of the order.
        place: Rank, world size, accumulation.
        num_workers: Processes that collate.
        weights: What each row adds to the denominator of the loss.
        bucket_batches: How many batches' rows are sorted by length together.
    """
    sampler = BucketBatchSampler(
        list(rows["length"]),
        weights,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        rank=place.rank,
        world_size=place.world_size,
        accumulate=place.accumulate,
        bucket_batches=bucket_batches,
    )
    return StatefulDataLoader(
        PlannedRows(rows.remove_columns("length")),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        # Its own generator: else making an iterator would draw from the global one, and a resumed run differ.
        generator=torch.Generator().manual_seed(seed),
    )
