"""Bad rows: all of them are found, and then they end the run or are dropped, as ``bad_rows`` of the data module says."""

import bisect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset

from rlhf_lightning.data.files import FILES, count_rows
from rlhf_lightning.data.rows import BAD, FILE_PLACE, INDEX, ROW_PLACE
from rlhf_lightning.errors import UserError

log = logging.getLogger(__name__)

Policy = Literal["error", "drop"]
LARGEST_SHARE = 0.05  # more bad rows than this are an error even where they are to be dropped
SHOWN = 10


@dataclass(frozen=True)
class Places:
    """What errors call the rows of a dataset: their file and row.

    Attributes:
        origin: What the user named.
        files: Where the rows are read from, in order; empty where they are not read from files.
        separator: Between the texts of a text file.
        noun: What rows are called that have no origin.
    """

    origin: str
    files: tuple[Path, ...] = ()
    separator: str | None = None
    noun: str = "rows"

    def locate(self, index: int) -> tuple[str, int]:
        """The file of a row, and its index in that file."""
        if len(self.files) < 2:
            return self.origin, index
        for file, rows in zip(self.files, counts(self.files, self.separator), strict=True):
            if index < rows:
                return str(file), index
            index -= rows
        raise IndexError(f"{self.origin} has no row {index}")

    def complete(self, fault: str, index: int) -> str:
        """The fault of a row, with the place written out."""
        file, row = self.locate(index)
        if fault.startswith(FILE_PLACE):
            return file + fault.removeprefix(FILE_PLACE)
        place = f"{file}, row {row + 1}" if file else f"row {row + 1} of the {self.noun}"
        return place + fault.removeprefix(ROW_PLACE)


def places_of(dataset: Dataset, origin: str) -> Places:
    """The places of a dataset that was just loaded from what the user named ``origin``."""
    files, separator = FILES.get(dataset, ((), None))
    return Places(str(files[0]) if len(files) == 1 else origin, files, separator)


@cache
def counts(files: tuple[Path, ...], separator: str | None) -> list[int]:
    """Rows of each file."""
    return [count_rows(file, separator) for file in files]


@dataclass
class BadRows:
    """Counts bad rows and remembers the first ten.

    Attributes:
        policy: Whether they end the run or are dropped.
        rows: Rows that were looked at.
        count: Bad ones among them.
        first: Order and description of the first ten.
        reasons: Different descriptions without their places, each with its count and first instance; not all of very many.
        places: Of the rows of each split.
    """

    policy: Policy = "error"
    rows: int = 0
    count: int = 0
    first: list[tuple[tuple[str, int], str]] = field(default_factory=list)
    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)
    places: dict[str, Places] = field(default_factory=dict)

    def add(self, fault: str, index: int, places: Places) -> None:
        """Count one; ``fault`` is as :meth:`Places.complete` takes it."""
        self.note(places.complete(fault, index), (places.origin, index), fault)

    def note(self, text: str, order: tuple[str, int], reason: str) -> None:
        """Count one whose place is written out already; they are listed in the order of their source and index."""
        self.count += 1
        bisect.insort(self.first, (order, text))
        del self.first[SHOWN:]
        if reason in self.reasons or len(self.reasons) < SHOWN:
            number, instance = self.reasons.get(reason, (0, text))
            self.reasons[reason] = number + 1, instance

    def take(self, dataset: Dataset, places: Places) -> Dataset:
        """The good rows of a dataset; the bad ones are counted."""
        if BAD not in dataset.column_names:
            return dataset
        column = dataset.select_columns([BAD]).with_format("arrow")[:][BAD]
        if column.null_count == len(dataset):
            return dataset.remove_columns(BAD)
        faults = column.to_pylist()
        indices = dataset.select_columns([INDEX])[INDEX][:] if INDEX in dataset.column_names else range(len(faults))
        for fault, index in zip(faults, indices, strict=True):
            if fault is not None:
                self.add(fault, index, places)
        good = np.flatnonzero([fault is None for fault in faults])
        return dataset.remove_columns(BAD).select(good)

    def settle(self) -> None:
        """Log what was dropped.

        Raises:
            UserError: If there are bad rows and they are not to be dropped, or are too many; lists the first ten.
        """
        if not self.count:
            return
        if self.policy == "error" or self.count > LARGEST_SHARE * self.rows:
            raise self.error()
        log.warning("dropped %d of %d rows, which are bad; the first: %s", self.count, self.rows, self.first[0][1])

    def error(self) -> UserError:
        """The first bad rows in a list; one line where there is one, or all are bad in the same way."""
        lines: Sequence[str] = [text for _, text in self.first]
        if self.count == 1 and self.policy == "error":
            return UserError(lines[0])
        same, instance = max(self.reasons.values())
        if same > 1 and same > self.rows / 2:  # it is not the rows that are wrong
            every = f"all {same} rows" if same == self.rows else f"{same} of {self.rows} rows"
            return UserError(f"{instance} (and so {every})")
        share = f", more than {LARGEST_SHARE:.0%}" if self.policy == "drop" else ""
        shown = "" if self.count == len(lines) else f"; the first {len(lines)}"
        advice = "correct them" if share else "correct them, or set data.bad_rows to drop"
        return UserError(
            f"{self.first[0][0][0]}: {self.count} of {self.rows} rows are bad{share}; {advice}{shown}:",
            *(f"  {line}" for line in lines),
        )
