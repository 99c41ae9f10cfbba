"""Batches from files that are read while the run goes on: the same batches each time, from any batch of any epoch on.

The rows of all files are numbered through. So many of them make a chunk, and a chunk is what a worker reads, converts and
tokenizes. So many tokenized rows make a window, whatever chunks they come from, and a window is planned as a whole dataset
is: its rows are shuffled by (seed, window, epoch), sorted into buckets, dealt out to ranks, and divided by the exact weight of
each optimizer step. A window is of whole steps, but for the last of an epoch.

Each rank tokenizes all rows, for a row's length decides which batch it is in, and its weight what others are divided by; each
then trains on its own rows only. Workers share the chunks of a rank among them.
"""

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.callbacks import Timer
from torch.utils.data import DataLoader

from rlhf_lightning.data.bad_rows import LARGEST_SHARE, BadRows
from rlhf_lightning.data.chunks import CHUNK_ROWS, NUMBER, Chunk, Chunks, Reading
from rlhf_lightning.data.loaders import Placement
from rlhf_lightning.data.rows import Row
from rlhf_lightning.data.sampler import BatchPlan, BucketBatchSampler
from rlhf_lightning.errors import UserError

log = logging.getLogger(__name__)

ENOUGH_ROWS = 1000  # of a stream, to tell the share of its bad rows
SEED_STEP = 2_000_003  # between the seeds of two windows


class StreamLoader:
    """Batches of one rank. Has no length: how many rows are left is known at the end of an epoch.

    Attributes:
        where: Gives epoch and batch to begin at, as :class:`.RowLoader` asks; None for one epoch after the other.
        known: A window of an epoch and the number of its first row, to begin at without counting from the first.
    """

    where: Callable[[], tuple[int, int]] | None = None

    def __init__(
        self,
        reading: Reading,
        collate: Callable[..., Any],
        *,
        batch_size: int,
        seed: int,
        place: Placement,
        num_workers: int,
        bucket_batches: int,
        window_rows: int,
    ) -> None:
        """Read nothing yet; arguments as of :func:`.make_loader` and :class:`.StreamSource`."""
        self.reading, self.collate, self.weight = reading, collate, reading.tokenization().weight
        self.batch_size, self.seed, self.place = batch_size, seed, place
        self.num_workers, self.bucket_batches = num_workers, bucket_batches
        batch = batch_size * place.world_size
        self.window_rows = math.ceil(window_rows / (batch * place.accumulate)) * batch * place.accumulate
        self.window_batches = self.window_rows // batch
        self.epoch = 0
        self.known = Known(0, 0, 0, self.window_rows)
        self.begun: dict[int, Known] = {}

    def __iter__(self) -> Iterator[Any]:
        """Batches, from there to the end of the epoch."""
        epoch, position = self.where() if self.where is not None else (self.epoch, 0)
        self.epoch = epoch + 1
        window, done = divmod(position, self.window_batches)
        first = self.known
        if (first.epoch, first.window_rows) != (epoch, self.window_rows) or first.window > window:
            first = Known(epoch, 0, 0, self.window_rows)
        self.begun, before = {}, -1
        for number, rows in enumerate(self._windows(first.row), start=first.window):
            if rows[0][NUMBER] != before:  # else it begins amid what one row has made, where nobody can begin to read
                self.begun[number] = Known(epoch, number, rows[0][NUMBER], self.window_rows)
            before = rows[-1][NUMBER]
            if number >= window:
                yield from self._batches(rows, epoch, number, done if number == window else 0)

    def known_at(self, epoch: int, position: int) -> "Known":
        """The nearest window before a batch whose first row is known."""
        window = position // self.window_batches
        begun = [known for known in self.begun.values() if known.epoch == epoch and known.window <= window]
        return max(begun, key=lambda known: known.window, default=Known(epoch, 0, 0, self.window_rows))

    def state_dict(self) -> dict[str, Any]:
        """Nothing to remember; that there is this method tells Lightning that the loader can begin anywhere."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do."""

    def _windows(self, first: int) -> Iterator[list[Row]]:
        """Tokenized rows, window by window; the last is smaller, or larger by fewer rows than there are ranks."""
        rows: list[Row] = []
        count, remarks = 0, Counter[str]()
        bad = BadRows(self.reading.bad_rows)
        for chunk in self._chunks(first):
            if chunk.error is not None:
                raise UserError(*chunk.error)
            take_bad(bad, chunk)
            for remark in chunk.remarks.keys() - remarks.keys():
                log.warning("some rows of the stream are %s; how many is said at the end of the epoch", remark)
            remarks += chunk.remarks
            rows += chunk.rows
            count += len(chunk.rows)
            while len(rows) >= self.window_rows + self.place.world_size:
                yield rows[: self.window_rows]
                rows = rows[self.window_rows :]
        if rows:
            yield rows
        bad.settle()
        for remark, number in remarks.items():
            log.warning("%d rows of the stream are %s; %d are in batches", number, remark, count)
        if not count and not first:
            raise UserError(f"no row of the stream is left: all are {', '.join(remarks)}")

    def _chunks(self, first: int) -> Iterator[Chunk]:
        ahead = math.ceil(self.window_rows / CHUNK_ROWS / max(self.num_workers, 1))
        return iter(
            DataLoader(
                Chunks(self.reading, first),
                batch_size=None,
                num_workers=self.num_workers,
                prefetch_factor=ahead if self.num_workers else None,  # a window, while another one is trained on
                collate_fn=as_it_is,  # type: ignore[arg-type]
                worker_init_fn=one_thread,
                generator=torch.Generator().manual_seed(self.seed),  # its own, see `make_loader`
            )
        )

    def _batches(self, rows: list[Row], epoch: int, window: int, position: int) -> Iterator[Any]:
        sampler = BucketBatchSampler(
            np.array([row["length"] for row in rows]),
            np.array([row[self.weight] if self.weight else 1 for row in rows]),
            batch_size=self.batch_size,
            shuffle=True,
            seed=self.seed + SEED_STEP * window,
            rank=self.place.rank,
            world_size=self.place.world_size,
            accumulate=self.place.accumulate,
            bucket_batches=self.bucket_batches,
        )
        sampler.begin(epoch, position)
        for plan in sampler:
            yield self.collate(columns_of(rows, plan))


def take_bad(bad: BadRows, chunk: Chunk) -> None:
    """Count the bad rows of a chunk that were dropped; raises UserError once they are too many of a large number."""
    bad.rows += chunk.read
    number, text = chunk.bad
    if number:
        bad.note(text, ("the stream", bad.count), text)
        bad.count += number - 1
    if bad.rows >= ENOUGH_ROWS and bad.count > LARGEST_SHARE * bad.rows:
        raise bad.error()


class Known(NamedTuple):
    """Where a window begins: plain data, for a checkpoint.

    Attributes:
        epoch: Its epoch.
        window: Its number in the epoch.
        row: Number of its first row over all files.
        window_rows: Rows of a window; with others its number means another place.
    """

    epoch: int
    window: int
    row: int
    window_rows: int


def check_stream(trainer: Any) -> None:
    """See that a run over a stream knows where it ends.

    Raises:
        UserError: If it does not, or its end is given in epochs, whose length nobody knows.
    """
    if trainer is None or trainer.fast_dev_run:
        return
    timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)
    if trainer.max_steps < 1 and not timed and getattr(trainer.lightning_module, "iterations", None) is None:
        raise UserError(
            "how many rows a stream has is not known before its end: set trainer.max_steps, or model.iterations of a method "
            "that samples, or trainer.max_time"
        )
    if trainer.max_epochs != -1:
        raise UserError(
            "how long an epoch of a stream is is not known: leave trainer.max_epochs out, max_steps says where to end"
        )
    if trainer.limit_train_batches != 1.0:
        raise UserError(
            "a stream ends where trainer.max_steps says, or source and split.limit; leave limit_train_batches out"
        )
    if isinstance(trainer.val_check_interval, float) and trainer.val_check_interval != 1.0:
        raise UserError("a stream's epochs have no known length: give trainer.val_check_interval in batches")


def columns_of(rows: list[Row], plan: BatchPlan) -> tuple[dict[str, list[Any]], float]:
    """What a collator takes: the columns of the planned rows, as lists, and the normaliser."""
    chosen = [rows[number] for number in plan.rows]
    names = [name for name in chosen[0] if name not in ("length", NUMBER)]
    plain = {name: [row[name] for row in chosen] for name in names}
    columns = {
        name: [value.tolist() if isinstance(value, np.ndarray) else value for value in values]
        for name, values in plain.items()
    }
    return columns, plan.normalizer


def as_it_is(chunk: Chunk) -> Chunk:
    """What the worker sends is what the loader gets."""
    return chunk


def one_thread(worker: int) -> None:
    """Workers are the parallelism: a tokenizer's own threads do not live through a fork."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
