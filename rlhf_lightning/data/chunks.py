"""Rows of many files, tokenized chunk by chunk: what a worker of a stream does, and the same whichever worker does it."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import List
from torch.utils.data import IterableDataset, get_worker_info

from rlhf_lightning.data.bad_rows import BadRows, Places, Policy
from rlhf_lightning.data.columns import AS_THEY_ARE, ColumnMap
from rlhf_lightning.data.format_table import BESIDE, READ, TEMPLATE, detect_format, find_format
from rlhf_lightning.data.formats import Converter
from rlhf_lightning.data.prompt_format import PromptFormat
from rlhf_lightning.data.rows import BAD, ROW_PLACE, BadRowError, Row
from rlhf_lightning.data.sources import Kind
from rlhf_lightning.data.streams import stream_rows
from rlhf_lightning.data.tokenization import COUNTED, Tokenization
from rlhf_lightning.errors import UserError

CHUNK_ROWS = 256
NUMBER = "number of the row"  # the key under which a tokenized row remembers it


class Place(NamedTuple):
    """A row's file, and its index in that file."""

    file: Path
    row: int

    def __str__(self) -> str:
        return f"{self.file}, row {self.row + 1}"


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
        mapping: Which columns are read as which.
        detected: Whether the format was detected.
        bad_rows: Whether bad rows end the run or are dropped.
    """

    files: tuple[Path, ...]
    kind: Kind
    format: str
    shape: str
    columns: tuple[str, ...]
    tokenization: Callable[[], Tokenization]
    limit: int | None = None
    mapping: ColumnMap = AS_THEY_ARE
    detected: bool = True
    bad_rows: Policy = "error"

    @property
    def prompt_format(self) -> PromptFormat:
        """Format of all rows."""
        return "messages" if "as messages" in self.shape else "text"

    def converter(self) -> Converter:
        """Converts rows that must be like the first."""
        converter = Converter(find_format(self.format), self.kind, "", self.mapping, self.detected)
        converter.shape = self.shape
        return converter

    def rows(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Place, Row | None]]:
        """Number, place and values of every row; None in place of what is not wanted."""
        first = 0
        for file in self.files:
            number = -1
            for number, row in enumerate(stream_rows(file, partial(shifted, wanted, first), mark_bad=True)):
                if self.limit is not None and first + number >= self.limit:
                    return
                yield first + number, Place(file, number), None if row is None else self.mapping.apply_row(row)
            first += number + 1


def shifted(wanted: Callable[[int], bool], by: int, number: int) -> bool:
    """Whether the row is wanted that a file counts as ``number``, ``by`` rows into the stream."""
    return wanted(by + number)


def make_reading(
    files: list[Path],
    kind: Kind,
    format: str | None,
    tokenization: Callable[[], Tokenization],
    limit: int | None,
    mapping: ColumnMap = AS_THEY_ARE,
    bad_rows: Policy = "error",
    announce: bool = True,
) -> Reading:
    """Look at the first rows to learn what all must be like; log the format that they are in, unless ``announce`` is false.

    Raises:
        UserError: If the first row is in no known format, or no row has anything to learn.
    """
    converter: Converter | None = None
    columns: tuple[str, ...] = ()
    fault = None
    mapping.check_targets({*READ, *BESIDE[kind], *TEMPLATE, *(mapping.names if kind == "prompts" else ())})
    unlike = Reading(tuple(files), kind, "", "", (), tokenization, limit, mapping, format is None, bad_rows)
    for _, place, row in unlike.rows(lambda number: True):
        assert row is not None
        if converter is None and row.get(BAD) is None:
            converter, columns = first_converter(row, place, kind, format, mapping), tuple(row)
        try:
            if converter is not None and converter.try_row(row, ROW_PLACE):
                if announce:
                    converter.announce(columns)
                return replace(unlike, format=converter.format.name, shape=converter.shape, columns=columns)
        except BadRowError as error:  # reading lists it among the others
            fault = fault or place_of(place).complete(str(error), place.row)
    if fault is not None:
        raise UserError(fault)
    reasons = converter.reasons() if converter is not None else "there is none"
    raise UserError(f"{files[0]}: no row is left for {kind}: {reasons}")


def place_of(place: Place) -> Places:
    """Completes the faults of rows of one file."""
    return Places(str(place.file))


def first_converter(row: Row, place: Place, kind: Kind, format: str | None, mapping: ColumnMap) -> Converter:
    """What converts rows like the first one.

    Raises:
        UserError: If it is in no known format, or the mapping names columns that it lacks.
    """
    columns = [name for name in row if name not in mapping.unused]
    try:
        missing = [source for target, source in mapping.names.items() if target not in row]
        if missing:
            raise UserError(f"data.columns names the column '{missing[0]}': found {', '.join(row)}")
        found = find_format(format) if format else detect_format(columns, mapping.respell_row(row), kind, mapping)
    except UserError as error:
        raise UserError(f"{place}: {error.lines[0]}", *error.lines[1:]) from error
    return Converter(found, kind, str(place.file), mapping, format is None)


class Chunk(NamedTuple):
    """Consecutive rows, tokenized.

    Attributes:
        rows: Those that are kept.
        remarks: How many were cut or left out, by reason.
        error: What is wrong with rows, one a line; the other rows of this chunk are then not there either.
        read: Rows that it was made of.
        bad: How many of them were dropped because they are bad, and the first of those.
    """

    rows: list[Row]
    remarks: Counter[str]
    error: tuple[str, ...] | None = None
    read: int = 0
    bad: tuple[int, str] = (0, "")


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
        gathered: list[tuple[int, Place, Row]] = []
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
            yield Chunk([], Counter(), tuple(error.lines))


class ChunkEncoder:
    """Converts and tokenizes the rows of a chunk."""

    def __init__(self, reading: Reading) -> None:
        self.reading, self.tokenization = reading, reading.tokenization()
        self.converter = reading.converter()
        lists = {name: of for name, of in self.tokenization.features.items() if isinstance(of, List)}
        self.types = {name: of.feature.dtype for name, of in lists.items()}

    def __call__(self, gathered: list[tuple[int, Place, Row]]) -> Chunk:
        """Raises UserError if rows are bad and an error, or one is refused for its length."""
        self.converter.dropped = Counter()
        bad = BadRows(self.reading.bad_rows, len(gathered))
        numbers, places, rows = [], [], []
        for number, place, row in gathered:
            try:
                made_of_row = self.converter.try_row(row, ROW_PLACE)
            except BadRowError as error:
                bad.add(str(error), place.row, place_of(place))
                continue
            except UserError as error:
                raise UserError(f"{place}: {error}") from error
            for new in made_of_row:
                rows.append({**new, **self.others(row, place)})
                numbers.append(number)
                places.append(place)
        kept = []
        remarks = Counter({f"left out: {reason}": count for reason, count in self.converter.dropped.items()})
        for source, made in self.tokenization.try_each(rows, [ROW_PLACE] * len(rows)):
            number, place, row = numbers[source], places[source], rows[source]
            if isinstance(made, UserError):
                bad.add(str(made), place.row, place_of(place))
                continue
            keep, remark = self.tokenization.remark(made, str(place))
            remarks.update([remark] if remark else [])
            if keep:
                kept.append({**(row if self.tokenization.keeps else {}), **self.packed(made), NUMBER: number})
        if bad.count and bad.policy == "error":
            raise bad.error()
        return Chunk(kept, remarks, None, len(gathered), (bad.count, bad.first[0][1] if bad.first else ""))

    def packed(self, made: Row) -> Row:
        """The new columns that batches are made of, with lists as arrays, which take a tenth of the memory."""
        return {
            name: np.array(value, dtype=self.types[name]) if name in self.types else value
            for name, value in made.items()
            if name not in COUNTED
        }

    def others(self, row: Row, place: Place) -> Row:
        """The columns that the format does not use; of prompts all have those of the first row, for rewards ask for them."""
        if not self.tokenization.keeps:
            return {name: row[name] for name in self.converter.divide(list(row))[1]}
        new = [name for name in row if name not in self.reading.columns]
        if new:
            raise UserError(f"{place}: the first row has no column '{new[0]}'; write it there too, as null if need be")
        return {name: row.get(name) for name in self.converter.divide(self.reading.columns)[1]}
