"""JSON and CSV files held to what they should be, with an error that names the line."""

import csv
import gzip
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from rlhf_lightning.errors import UserError

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def open_text(path: Path) -> IO[str]:
    """A text file, decompressed if its name ends in .gz; in CSV, whose fields may hold some, with its line ends as they are."""
    newline = "" if path.suffix.lower() == ".csv" else None
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", newline=newline)


def read_with(path: Path, read: Callable[[Path, IO[str]], Any]) -> Any:
    """What ``read`` makes of a text file.

    Raises:
        UserError: What ``read`` raises, or if the file is not UTF-8 or not whole.
    """
    try:
        with open_text(path) as file:
            return read(path, file)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): {error.reason}") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path} is not a complete gzip file: {error}") from error


def read_json(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON file, a list or an object on every line, exactly as Python's own parser reads them.

    Faster parsers guess: that text is a date, that a column named "messages" is an agent's trace, that a half surrogate
    pair may go.

    Raises:
        UserError: If it is damaged; names the line.
    """
    return read_with(path, lambda path, file: (json_list if first_character(file) == "[" else json_lines)(path, file))


def first_character(file: IO[str]) -> str:
    """The first character that is no whitespace; leaves the file at its beginning."""
    for line in file:
        if line.strip():
            file.seek(0)
            return line.strip()[0]
    return ""


def json_lines(path: Path, file: IO[str]) -> list[dict[str, Any]]:
    """One JSON object with content on every line; blank lines only at the end."""
    blank, rows = None, []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            blank = blank or number
            continue
        if blank:
            raise UserError(f"{path}, line {blank}: an empty line between rows; remove it")
        place = f"{path}, line {number}"
        rows.append(check_row(parse(line, path, number), place, bool(SURROGATE.search(line))))
    return rows


def json_list(path: Path, file: IO[str]) -> list[dict[str, Any]]:
    """A JSON list of objects with content."""
    text = file.read()
    rows = parse(text, path)
    escaped = bool(SURROGATE.search(text))
    return [check_row(row, f"{path}, row {number}", escaped) for number, row in enumerate(rows, start=1)]


def parse(text: str, path: Path, line: int | None = None) -> Any:
    """A JSON document in which no object has a key twice: a whole file, or one line of it.

    Raises:
        UserError: If it is none.
    """
    place = str(path) if line is None else f"{path}, line {line}"
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line or error.lineno}, character {error.colno}"
        raise UserError(f"{where}: not JSON ({error.msg}): {text.strip()[:60]!r}") from error
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error
    except RecursionError as error:
        raise UserError(f"{place}: lists or objects are nested too deeply to be read") from error


def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError if a key stands there twice: one of its values would be lost."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} stands twice in one object; remove one")
    return made


def whole_number(digits: str) -> int:
    """A whole number. Raises ValueError if a column of 64 bits can't hold it."""
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"{digits:.30} is too large a number; write it as text")
    return int(digits)


DECODER = json.JSONDecoder(object_pairs_hook=without_twins, parse_int=whole_number)


def check_row(row: Any, place: str, escaped: bool) -> dict[str, Any]:
    """The row, an object in which something is said; ``escaped`` if it may hold halves of surrogate pairs."""
    if not isinstance(row, dict):
        raise UserError(f"{place}: a row must be an object {{column: value}}, not {type(row).__name__} {row!r:.40}")
    if all(value in (None, "", [], {}) for value in row.values()):
        raise UserError(f"{place}: the row is empty; columns {', '.join(row) or '(none)'}")
    if escaped:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise UserError(f"{place}: {half} is half of a surrogate pair and no character; remove it") from error
    return row


def check_csv(path: Path) -> None:
    """As many fields on every line as the header has, and no column twice.

    Other readers take the first column for row numbers where lines are one field longer than the header, and rename twins.

    Raises:
        UserError: If it is not so, or there are no rows; names the line.
    """
    read_with(path, csv_fields)


def csv_fields(path: Path, file: IO[str]) -> None:
    """See :func:`check_csv`."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(file)
    try:
        header = next(reader, [])
        twice = [name for name in header if header.count(name) > 1]
        if twice:
            raise UserError(f"{path}, line 1: column {twice[0]!r} stands twice in the header; remove or rename one")
        rows = 0
        for row in reader:
            if row and len(row) != len(header):
                raise UserError(f"{path}, line {reader.line_num}: {len(row)} fields where the header has {len(header)}")
            rows += bool(row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
    if not rows:
        raise UserError(f"{path} has no rows")
