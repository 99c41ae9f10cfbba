"""CSV files row by row: as many fields on every line as the header has, and types that all lines agree on."""

import csv
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_lightning.data.rows import TEXT_COLUMNS, Row
from rlhf_lightning.data.text_files import reading
from rlhf_lightning.errors import UserError

WHOLE = re.compile(r"\s*[+-]?(0|[1-9]\d{0,18})\s*", re.ASCII)  # "007" is no number
FRACTION = re.compile(r"\s*[+-]?(\d+\.\d*|\.\d+|\d+\.?\d*[eE][+-]?\d+)\s*", re.ASCII)
TRUTH = {"true": True, "false": False}


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


def read_csv(path: Path) -> Iterator[Row]:
    """The rows; what is text stays so, "007", "True" and "None" too, and only an empty field is missing.

    The file is read twice: whether a column holds numbers is known at its end.

    Raises:
        UserError: If a line has another number of fields than the header, a column stands there twice, or there are no
            rows; names the line. Other readers take the first column for row numbers, and rename twins.
    """
    lines = csv_lines(path)
    header = next(lines, [])
    kinds = [TEXT if name in TEXT_COLUMNS else None for name in header]
    empty = True
    for line in lines:
        empty = False
        for column, field in enumerate(line):
            kind = kinds[column]
            if field and (kind is None or not kind.fits(field)):
                kinds[column] = wider(kind, field)
    if empty:
        raise UserError(f"{path} has no rows")
    convert = [(kind or TEXT).read for kind in kinds]
    lines = csv_lines(path)
    next(lines)
    for line in lines:
        fields = zip(header, convert, line, strict=True)
        yield {name: make(field) if field else None for name, make, field in fields}


def csv_lines(path: Path) -> Iterator[list[str]]:
    """The header, and every line that is not blank."""
    csv.field_size_limit(sys.maxsize)
    with reading(path, newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            twice = [name for name in header if header.count(name) > 1]
            if twice:
                raise UserError(f"{path}, line 1: column {twice[0]!r} stands twice in the header; remove or rename one")
            yield header
            for row in reader:
                if row and len(row) != len(header):
                    raise UserError(
                        f"{path}, line {reader.line_num}: {len(row)} fields where the header has {len(header)}"
                    )
                if row:
                    yield row
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
