"""CSV files row by row: as many fields on every line as the header has, and types that all lines agree on.

Commas, semicolons or tabs divide the fields, whichever the header has most of; in a .tsv file it is tabs.
"""

import csv
import re
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_lightning.data.rows import TEXT_COLUMNS, Row, bad_row
from rlhf_lightning.data.text_files import reading
from rlhf_lightning.errors import UserError

WHOLE = re.compile(r"\s*[+-]?(0|[1-9]\d{0,18})\s*", re.ASCII)  # "007" is no number
FRACTION = re.compile(r"\s*[+-]?(\d+\.\d*|\.\d+|\d+\.?\d*[eE][+-]?\d+)\s*", re.ASCII)
TRUTH = {"true": True, "false": False}
DELIMITERS = ",;\t"  # the first of those that the header has most of
BLANK_TEXT = ("rejected", "rejected_response", "completion")  # an empty field here is a response that says nothing


def is_whole(field: str) -> bool:
    """Whether the field is a whole number that a column of 64 bits holds."""
    return WHOLE.fullmatch(field) is not None and -(2**63) <= int(field) < 2**63


def is_fraction(field: str) -> bool:
    return FRACTION.fullmatch(field) is not None


def is_truth(field: str) -> bool:
    return field.strip().lower() in TRUTH


def truth(field: str) -> bool:
    return TRUTH[field.strip().lower()]


class Kind(NamedTuple):
    """What the fields of a column are: how to tell, and how to read them."""

    fits: Callable[[str], bool]
    read: Callable[[str], Any]


TEXT = Kind(lambda field: True, str)
WHOLES = Kind(is_whole, int)
NUMBERS = Kind(lambda field: is_whole(field) or is_fraction(field), float)
KINDS = (Kind(is_truth, truth), WHOLES, NUMBERS, TEXT)


def wider(kind: Kind | None, field: str) -> Kind:
    """The kind of a column that has held ``kind`` up to here, and now holds a field that is none."""
    found = next(known for known in KINDS if known.fits(field))
    return found if kind is None or (kind, found) == (WHOLES, NUMBERS) else TEXT


def read_csv(path: Path, mark_bad: bool = False, text: Collection[str] = ()) -> Iterator[Row]:
    """The rows; what is text stays so, "007", "True" and "None" too, and only an empty field is missing.

    The file is read twice: whether a column holds numbers is known at its end.

    Args:
        path: The file.
        mark_bad: Give a :func:`.bad_row` in place of a line that can't be read.
        text: Columns that hold text beside those that always do.

    Raises:
        UserError: If a line has another number of fields than the header, a column stands there twice, or there are no
            rows; names the line. Other readers take the first column for row numbers, and rename twins.
    """
    lines = csv_lines(path)
    header = header_of(lines)
    known = {*TEXT_COLUMNS, *text}
    kinds = [TEXT if name in known else None for name in header]
    empty = True
    for line in lines:
        empty = False
        if isinstance(line, UserError):
            if not mark_bad:
                raise line
            continue
        for column, field in enumerate(line):
            kind = kinds[column]
            if field and (kind is None or not kind.fits(field)):
                kinds[column] = wider(kind, field)
    if empty:
        raise UserError(f"{path} has no rows")
    convert = [(kind or TEXT).read for kind in kinds]
    blank = [column in BLANK_TEXT or column in text for column in header]
    lines = csv_lines(path)
    header_of(lines)
    for line in lines:
        if isinstance(line, UserError):
            yield bad_row(line, path)
            continue
        fields = zip(header, convert, blank, line, strict=True)
        yield {name: make(field) if field or keep else None for name, make, keep, field in fields}


def header_of(lines: Iterator[list[str] | UserError]) -> list[str]:
    """The first line, or no columns where there is none."""
    header = next(lines, [])
    assert isinstance(header, list)
    return header


def delimiter_of(path: Path) -> str:
    """What divides the fields: of a .tsv file tabs, else what the header has most of outside quotes."""
    if path.name.lower().removesuffix(".gz").endswith(".tsv"):
        return "\t"
    with reading(path, newline="") as file:
        header = re.sub(r'"[^"]*"', "", file.readline())
    return max(DELIMITERS, key=header.count)


def csv_lines(path: Path) -> Iterator[list[str] | UserError]:
    """The header, and every line that is not blank, or what is wrong with it."""
    csv.field_size_limit(sys.maxsize)
    delimiter = delimiter_of(path)
    with reading(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        try:
            header = next(reader, [])
            twice = [name for name in header if header.count(name) > 1]
            if twice:
                raise UserError(f"{path}, line 1: column {twice[0]!r} stands twice in the header; remove or rename one")
            yield header
            for row in reader:
                if row and len(row) != len(header):
                    found = f"{len(row)} fields where the header has {len(header)}"
                    yield UserError(f"{path}, line {reader.line_num}: {found}")
                elif row:
                    yield row
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
