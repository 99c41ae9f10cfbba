"""Rows of many files, tokenized chunk by chunk: what a worker of a stream does, and the same whichever worker does it."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import List
from torch.utils.data import IterableDataset, get_worker_info

from rlhf_lightning.data.formats import Converter, detect_format, find_format
from rlhf_lightning.data.rows import Row
from rlhf_lightning.data.sources import Kind
from rlhf_lightning.data.streams import stream_rows
from rlhf_lightning.data.tokenization import COUNTED, Tokenization
from rlhf_lightning.errors import UserError

CHUNK_ROWS = 256
NUMBER = "number of the row"  # the key under which a tokenized row remembers it


@dataclass(frozen=True)
class Reading:
    """How rows of files become tokens; plain data and functions of modules, so that it can be sent to a worker.

    Attributes:
        files: In order.
        kind: What the rows are wanted for.
        format: Name of their format.
        shape: Text or messages, as :class:`.Converter` says it: that of the first row.
        columns: Columns of the first row.
        tokenization: Makes the tokenization.
        limit: Number of rows that are read; None for all.
    """

    files: tuple[Path, ...]
    kind: Kind
    format: str
    shape: str
    columns: tuple[str, ...]
    tokenization: Callable[[], Tokenization]
    limit: int | None = None

    def converter(self) -> Converter:
        """Converts rows that must be like the first."""
        converter = Converter(find_format(self.format), self.kind, "")
        converter.shape = self.shape
        return converter

    def rows(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, str, Row | None]]:
        """Number, place and values of every row; None in place of what is not wanted."""
        first = 0
        for file in self.files:
            number = -1
            for number, row in enumerate(stream_rows(file, partial(shifted, wanted, first))):
                if self.limit is not None and first + number >= self.limit:
                    return
                yield first + number, f"{file}, row {number + 1}", row
            first += number + 1


def shifted(wanted: Callable[[int], bool], by: int, number: int) -> bool:
    """Whether the row is wanted that a file counts as ``number``, ``by`` rows into the stream."""
    return wanted(by + number)


def make_reading(
    files: list[Path], kind: Kind, format: str | None, tokenization: Callable[[], Tokenization], limit: int | None
) -> Reading:
    """Look at the first rows to learn what all must be like.

    Raises:
        UserError: If the first row is in no known format, or no row has anything to learn.
    """
    converter = None
    columns: tuple[str, ...] = ()
    for _, place, row in Reading(tuple(files), kind, "", "", (), tokenization, limit).rows(lambda number: True):
        assert row is not None
        if converter is None:
            try:
                found = find_format(format) if format else detect_format(list(row), row)
            except UserError as error:
                raise UserError(f"{place}: {error}") from error
            converter, columns = Converter(found, kind, str(files[0])), tuple(row)
            converter.announce()
        if converter.try_row(row, place):
            return Reading(tuple(files), kind, converter.format.name, converter.shape, columns, tokenization, limit)
    reasons = converter.reasons() if converter is not None else "there is none"
    raise UserError(f"{files[0]}: no row is left for {kind}: {reasons}")


class Chunk(NamedTuple):
    """Consecutive rows, tokenized.

    Attributes:
        rows: Those that are kept.
        remarks: How many were cut or left out, by reason.
        error: What is wrong with a row; the rows before it in this chunk are then not there either.
    """

    rows: list[Row]
    remarks: Counter[str]
    error: str | None = None


class Chunks(IterableDataset[Chunk]):
    """The chunks from a row on; in a worker, each ``n``-th of them."""

    def __init__(self, reading: Reading, first: int) -> None:
        """``first`` is the number of the row to begin at."""
        self.reading, self.first = reading, first

    def __iter__(self) -> Iterator[Chunk]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        start = self.first // CHUNK_ROWS

        def wanted(number: int) -> bool:
            return number >= self.first and (number // CHUNK_ROWS - start) % workers == worker

        encode = ChunkEncoder(self.reading)
        gathered: list[tuple[int, str, Row]] = []
        try:
            for number, place, row in self.reading.rows(wanted):
                if gathered and gathered[0][0] // CHUNK_ROWS != number // CHUNK_ROWS:
                    yield encode(gathered)
                    gathered = []
                if row is not None:
                    gathered.append((number, place, row))
            if gathered:
                yield encode(gathered)
        except UserError as error:  # a worker would wrap it in its traceback
            yield Chunk([], Counter(), str(error))


class ChunkEncoder:
    """Converts and tokenizes the rows of a chunk."""

    def __init__(self, reading: Reading) -> None:
        self.reading, self.tokenization = reading, reading.tokenization()
        self.converter = reading.converter()
        lists = {name: of for name, of in self.tokenization.features.items() if isinstance(of, List)}
        self.types = {name: of.feature.dtype for name, of in lists.items()}

    def __call__(self, gathered: list[tuple[int, str, Row]]) -> Chunk:
        """Raises UserError if a row is malformed, can't be encoded or is refused for its length."""
        self.converter.dropped = Counter()
        numbers, places, rows = [], [], []
        for number, place, row in gathered:
            for new in self.converter.try_row(row, place):
                numbers.append(number)
                places.append(place)
                rows.append({**new, **self.others(row, place)})
        kept = []
        remarks = Counter({f"left out: {reason}": count for reason, count in self.converter.dropped.items()})
        for source, made in self.tokenization.encode_each(rows, places):
            number, place, row = numbers[source], places[source], rows[source]
            keep, remark = self.tokenization.remark(made, place)
            remarks.update([remark] if remark else [])
            if keep:
                kept.append({**(row if self.tokenization.keeps else {}), **self.packed(made), NUMBER: number})
        return Chunk(kept, remarks)

    def packed(self, made: Row) -> Row:
        """The new columns that batches are made of, with lists as arrays, which take a tenth of the memory."""
        return {
            name: np.array(value, dtype=self.types[name]) if name in self.types else value
            for name, value in made.items()
            if name not in COUNTED
        }

    def others(self, row: Row, place: str) -> Row:
        """The columns that the format does not use; of prompts all have those of the first row, for rewards ask for them."""
        if not self.tokenization.keeps:
            return {name: row[name] for name in self.converter.divide(list(row))[1]}
        new = [name for name in row if name not in self.reading.columns]
        if new:
            raise UserError(f"{place}: the first row has no column '{new[0]}'; write it there too, as null if need be")
        return {name: row.get(name) for name in self.converter.divide(self.reading.columns)[1]}
