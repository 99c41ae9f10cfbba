"""Why a data file could not be read, to the line: looked for only once the reader has failed, or found nothing."""

import csv
import gzip
import json
from pathlib import Path
from typing import IO, Any

from rlhf_lightning.errors import UserError


def open_text(path: Path) -> IO[str]:
    """A text file, decompressed if its name ends in .gz."""
    return gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig")


def check_file(path: Path) -> None:
    """Raise a UserError that names file and line, if one is at fault; return if none is found."""
    try:
        with open_text(path) as file:
            if path.suffix == ".csv":
                check_csv(path, file)
            elif first_character(file) == "[":
                check_json_list(path, file)
            else:
                check_json_lines(path, file)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): {error.reason}") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path} is not a complete gzip file: {error}") from error


def first_character(file: IO[str]) -> str:
    """The first character that is no whitespace; leaves the file at its beginning."""
    for line in file:
        if line.strip():
            file.seek(0)
            return line.strip()[0]
    return ""


def check_json_lines(path: Path, file: IO[str]) -> None:
    """One JSON object with content on every line; blank lines only at the end."""
    blank = None
    for number, line in enumerate(file, start=1):
        if not line.strip():
            blank = blank or number
            continue
        if blank:
            raise UserError(f"{path}, line {blank}: an empty line between rows; remove it")
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}, character {error.colno}: not JSON ({error.msg}): {line:.60}"
            ) from error
        check_row(row, f"{path}, line {number}")


def check_json_list(path: Path, file: IO[str]) -> None:
    """A JSON list of objects with content."""
    try:
        rows = json.load(file)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, character {error.colno}: not JSON ({error.msg})") from error
    for number, row in enumerate(rows, start=1):
        check_row(row, f"{path}, row {number}")


def check_row(row: Any, place: str) -> None:
    """A row is an object in which something is said."""
    if not isinstance(row, dict):
        raise UserError(f"{place}: a row must be an object {{column: value}}, not {type(row).__name__} {row!r:.40}")
    if all(value in (None, "", [], {}) for value in row.values()):
        raise UserError(f"{place}: the row is empty; columns {', '.join(row) or '(none)'}")


def check_csv(path: Path, file: IO[str]) -> None:
    """As many fields on every line as the header has."""
    reader = csv.reader(file)
    header = next(reader, [])
    for row in reader:
        if row and len(row) != len(header):
            raise UserError(f"{path}, line {reader.line_num}: {len(row)} fields where the header has {len(header)}")
