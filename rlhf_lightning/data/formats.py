"""Row formats: find out which one a dataset is in, and bring it into the canonical columns of what it is wanted for.

Canonical columns, by kind: *demonstrations* have ``messages``, or ``prompt`` and ``completion``, or ``text``;
*preferences* have ``prompt``, ``chosen`` and ``rejected``; *unpaired* rows have ``prompt``, ``completion`` and ``label``;
*stepwise* rows have ``prompt``, ``completions`` (the steps, text) and ``labels`` (a probability each, null for none);
*prompts* have ``prompt``. Each is text throughout or lists
of ``{"role", "content"}`` throughout. Columns that the format does not use stay as they are.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Features

from rlhf_lightning.data.annotations import ANNOTATIONS, annotations
from rlhf_lightning.data.bad_rows import BadRows, Places, places_of
from rlhf_lightning.data.cache import cached_rows, dataset_hash
from rlhf_lightning.data.columns import AS_THEY_ARE, ColumnMap
from rlhf_lightning.data.format_table import (
    BESIDE,
    CANONICAL,
    FORMATS,
    PAIRS,
    READ,
    TEMPLATE,
    Format,
    detect_format,
    find_format,
)
from rlhf_lightning.data.nested import decode_cell, padded_columns, without_padding
from rlhf_lightning.data.rows import (
    BAD,
    INDEX,
    LEVEL,
    ROW_PLACE,
    WEIGHT,
    BadRowError,
    NoSignalError,
    Row,
    UnusedColumnError,
)
from rlhf_lightning.data.sources import Kind
from rlhf_lightning.data.tables import HELD_BYTES, RowWriter, collected
from rlhf_lightning.data.unused import Watch, lost_column
from rlhf_lightning.data.views import VIEWS
from rlhf_lightning.errors import UserError

log = logging.getLogger(__name__)

RANKED = ("completions", "ranks")  # as the prompt is, and numbers
BATCH = 1000  # rows converted together


def to_canonical(
    dataset: Dataset,
    kind: Kind,
    format: str | None = None,
    origin: str = "dataset",
    columns: ColumnMap = AS_THEY_ARE,
    bad: BadRows | None = None,
) -> Dataset:
    """Bring rows into the canonical columns of ``kind``.

    A dataset of pairs or of labelled completions serves demonstrations (what was preferred), one of pairs also unpaired rows
    (two of each), and any with a prompt serves prompts. Pairs of equal sides and disliked demonstrations are left out,
    counted and logged.

    Args:
        dataset: Rows in a known format.
        kind: What they are wanted for.
        format: Name of the format, where it should not be detected.
        origin: What errors call the dataset: its file.
        columns: Which columns are read as which.
        bad: Takes the bad rows; the result then has a column :data:`.INDEX`. None if they are an error.

    Raises:
        UserError: If no format fits, a row is malformed (names row and column), or no row is left.
    """
    ledger = bad if bad is not None else BadRows()
    ledger.rows += len(dataset)
    places = places_of(dataset, origin)
    dataset = columns.apply(dataset, origin)
    chosen = choose_format(dataset, format, origin, kind, columns, ledger, places)
    converter = Converter(chosen, kind, origin, columns, detected=format is None)
    converter.announce(dataset.column_names)
    used, others = converter.divide(dataset.column_names)
    padded = padded_columns(dataset, others)
    others = [name for name in others if name not in padded]
    given = Features({name: dataset.features[name] for name in others})
    read = [
        *used,
        *padded,
        *(name for name in converter.watch(tuple(dataset.column_names)).columns if name not in padded),
    ]
    structs = padded_columns(dataset, read)

    def fill(writer: RowWriter) -> None:
        beside = dataset.select_columns(others).with_format("arrow").iter(BATCH)
        for number, batch in enumerate(dataset.select_columns(read).iter(BATCH)):
            for name in structs:
                batch[name] = [without_padding(value, dataset.features[name]) for value in batch[name]]
            kept, rows = converter.convert_all(batch, padded, first=number * BATCH)
            table = next(beside) if others else None
            if rows:
                writer.write(rows, table.take(kept) if table is not None else None)
        if not writer.rows:
            raise UserError(f"{origin}: no row is left for {kind}: {converter.reasons()}")
        if converter.dropped:
            log.warning("%s: left out rows without anything to learn: %s", origin, converter.reasons())

    if dataset.data.nbytes <= HELD_BYTES:
        made = collected(fill, given)
    else:
        settings = {"format": converter.format.name, "kind": kind, "columns": repr(columns)}
        made = cached_rows(fill, {"rows": dataset_hash(dataset), **settings}, given)
    made = ledger.take(made, places)
    if bad is None:
        ledger.settle()
        return made.remove_columns(INDEX)
    if not len(made):
        raise ledger.error()
    return made


def choose_format(
    dataset: Dataset, name: str | None, origin: str, kind: Kind, columns: ColumnMap, bad: BadRows, places: Places
) -> Format:
    """The format asked for, or the one detected.

    Raises:
        UserError: If there is none, or columns that it needs are not there.
    """
    if not len(dataset):
        raise UserError(f"{origin} has no rows")
    names = [column for column in dataset.column_names if column not in (BAD, *columns.unused)]
    try:
        columns.check_targets({*READ, *BESIDE[kind], *TEMPLATE, *(columns.names if kind == "prompts" else ())})
        first = first_good_row(dataset)
        if first is None:
            bad.take(dataset, places)
            raise bad.error()
        found = find_format(name) if name else detect_format(names, columns.respell_row(first), kind, columns)
    except UserError as error:
        raise error if bad.count else UserError(f"{origin}: {error.lines[0]}", *error.lines[1:]) from error
    missing = [column for column in found.columns if column not in names]
    if missing:
        raise UserError(f"{origin}: format {found.name} needs columns {', '.join(missing)}; found {', '.join(names)}")
    return found


def first_good_row(dataset: Dataset) -> Row | None:
    """The first row that could be read."""
    if BAD not in dataset.column_names:
        return dataset[0]
    faults = dataset.select_columns([BAD])[BAD][:]
    return dataset[faults.index(None)] if None in faults else None


class Converter:
    """Converts rows one by one and counts what it leaves out."""

    def __init__(
        self, format: Format, kind: Kind, origin: str, columns: ColumnMap = AS_THEY_ARE, detected: bool = True
    ) -> None:
        """Begin with no row.

        Args:
            format: Of the rows.
            kind: What they are wanted for.
            origin: What the log and errors call their source.
            columns: Which columns are read as which.
            detected: Whether the format was detected: one that the user named may ignore other columns of text.
        """
        self.format, self.kind, self.origin, self.columns, self.detected = format, kind, origin, columns, detected
        self.dropped: Counter[str] = Counter()
        self.shape = ""
        self.alike: tuple[tuple[str, type], ...] = ()  # columns and types of the last row whose shape was checked
        read = (*format.columns, *format.optional, *ANNOTATIONS.get(kind, ()))
        self.read = tuple(name for name in read if name not in columns.unused)
        self.watches: dict[tuple[str, ...], Watch] = {}

    def announce(self, columns: Sequence[str]) -> None:
        """Say what the rows are taken for, and which columns nothing reads."""
        halves = {
            "demonstrations": " (prompt and chosen answer)",
            "unpaired": " (each pair as a liked and a disliked answer)",
        }
        taken = halves.get(self.kind, "") if self.format.serves == PAIRS else ""
        log.info("%s: format %s, used for %s%s", self.origin, self.format.name, self.kind, taken)
        used, others = self.divide(columns)
        if self.kind == "demonstrations" and WEIGHT in others:
            log.info("%s: each row weighs in the loss what its column '%s' says", self.origin, WEIGHT)
        known = (*used, *BESIDE[self.kind], *TEMPLATE, LEVEL, BAD)
        unused = [name for name in columns if name not in known]
        if unused and self.kind == "prompts":
            log.info("%s: reward functions get the columns %s", self.origin, ", ".join(unused))
        elif unused:
            log.info("%s: columns that are not used: %s", self.origin, ", ".join(unused))

    def divide(self, columns: Sequence[str]) -> tuple[list[str], list[str]]:
        """The columns that the format uses, and the others, which stay as they are."""
        used = [name for name in columns if name == BAD or name in self.read]
        # Alpaca's rows repeat themselves in a column "text": it is not to be taken for what is learnt.
        return used, [name for name in columns if name not in (*used, *CANONICAL[self.kind])]

    def watch(self, columns: tuple[str, ...]) -> Watch:
        """Those of the columns that the format does not use and that may not be lost."""
        if columns not in self.watches:
            self.watches[columns] = Watch(columns, self.read, self.columns.unused, self.detected)
        return self.watches[columns]

    def convert_all(
        self, columns: dict[str, list[Any]], copied: Sequence[str] = (), first: int = 0
    ) -> tuple[list[int], list[Row]]:
        """Convert a batch of rows.

        Args:
            columns: Of the batch.
            copied: Columns that the new rows keep.
            first: Index of the first row.

        Returns:
            For each new row the position in this batch of the one that it is made of, and its canonical columns, with its
            index and, of a bad row, only what is wrong with it.
        """
        kept: list[int] = []
        rows: list[Row] = []
        for place, values in enumerate(zip(*columns.values(), strict=True)):
            row = dict(zip(columns, values, strict=True))
            beside = {INDEX: first + place, **{name: row[name] for name in copied}}
            try:
                new = self.try_row(row, ROW_PLACE)
            except BadRowError as error:
                new = [{BAD: str(error)}]
            rows += [made | beside for made in new]
            kept += [place] * len(new)
        return kept, rows

    def try_row(self, row: Row, place: str) -> list[Row]:
        """The canonical columns of the rows that one makes: none if there is nothing to learn from it, which is counted.

        Raises:
            BadRowError: If it is malformed; names its place.
            UserError: If a column of it would be lost.
        """
        if row.get(BAD) is not None:
            raise BadRowError(row[BAD])
        row = self.respelt(row)
        watch = self.watch(tuple(row))
        lost = watch.lost(row, self.read) if watch.columns else None
        if lost is not None:
            raise self.lost(lost, row)
        try:
            return self.convert(row)
        except NoSignalError as reason:
            self.dropped[str(reason)] += 1
            return []
        except UnusedColumnError as error:
            raise self.lost(str(error), row) from error
        except UserError as error:
            raise BadRowError(f"{place} (read as {self.format.name}): {error}") from error

    def respelt(self, row: Row) -> Row:
        """The row without what is left out, JSON text in cells read, and messages in the keys that readers know."""
        unused = self.columns.unused
        read = {
            name: decode_cell(name, value) if isinstance(value, str) else value
            for name, value in row.items()
            if name not in unused
        }
        if self.columns.keys or self.columns.roles:
            read |= {name: self.columns.respell(read[name]) for name in self.read if name in read}
        return read

    def lost(self, column: str, row: Row) -> UserError:
        """The error about a column that would be lost."""
        error = lost_column(column, row, self.format, FORMATS, self.kind, self.columns)
        return UserError(f"{self.origin}: {error}" if self.origin else str(error))

    def convert(self, row: Row) -> list[Row]:
        """The canonical columns of what one row makes, all like the first: text throughout, or messages throughout."""
        made = VIEWS[self.kind](self.format.read(row))
        said = annotations(row, self.kind)
        new = [part | said for part in (made if isinstance(made, list) else [made])]
        kinds = tuple([(name, type(value)) for name, value in new[0].items()])
        if kinds != self.alike:
            self.check_shape(new[0])
            self.alike = kinds
        return new

    def check_shape(self, row: Row) -> None:
        """See that a row is like those before it.

        Raises:
            UserError: If it holds text where they hold messages, or other columns.
        """
        texts = {name: value for name, value in row.items() if isinstance(value, str | list) and name not in RANKED}
        shape = ", ".join(f"'{name}' as {'text' if isinstance(v, str) else 'messages'}" for name, v in texts.items())
        self.shape = self.shape or shape
        if shape != self.shape:
            raise UserError(f"gives {shape}, where the rows before give {self.shape}; make them alike")

    def reasons(self) -> str:
        """What was left out and why, in one line."""
        return ", ".join(f"{count} with {reason}" for reason, count in self.dropped.items())
