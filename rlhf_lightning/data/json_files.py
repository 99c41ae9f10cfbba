"""JSON files row by row, exactly as Python's own parser reads them, with an error that names the line.

Faster parsers guess: that text is a date, that a column named "messages" is an agent's trace, that half a surrogate pair may
go.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from rlhf_lightning.data.rows import Row, bad_row
from rlhf_lightning.data.text_files import CHUNK, reading
from rlhf_lightning.errors import UserError

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
SPACE = re.compile(r"[ \t\n\r]*")
# An error so close behind the end of what has been read may come of what has not: half a word, half an escape.
LONGEST_HALF = 16


def read_json(path: Path, mark_bad: bool = False) -> Iterator[Row]:
    """The rows of a JSON file, a list or an object on every line.

    Args:
        path: The file.
        mark_bad: Give a :func:`.bad_row` in place of a row that can't be read, where the rows after it can be.

    Raises:
        UserError: If it is damaged; names the line.
    """
    for row in json_rows(path, lambda number: True, mark_bad):
        assert row is not None
        yield row


def json_rows(path: Path, wanted: Callable[[int], bool], mark_bad: bool = False) -> Iterator[Row | None]:
    """As :func:`read_json`, but None for a row whose number, from 0, is not wanted: such a line is not parsed.

    Raises:
        UserError: If it is damaged; names the line.
    """
    with reading(path) as file:
        rows = json_list if first_character(file) == "[" else json_lines
        for row in rows(path, file, wanted):
            if isinstance(row, UserError) and not mark_bad:
                raise row
            yield bad_row(row, path) if isinstance(row, UserError) else row


def first_character(file: IO[str]) -> str:
    """The first character that is no whitespace; leaves the file at its beginning."""
    found = ""
    while not found and (chunk := file.read(CHUNK)):
        found = chunk.strip()[:1]
    file.seek(0)
    return found


def json_lines(path: Path, file: IO[str], wanted: Callable[[int], bool]) -> Iterator[Row | UserError | None]:
    """One JSON object with content on every line, or what is wrong with the line; blank lines only at the end."""
    blank: list[int] = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            blank.append(number)
            continue
        for empty in blank:
            error = UserError(f"{path}, line {empty}: an empty line between rows; remove it")
            yield error if wanted(empty - 1) else None
        blank = []
        yield json_line(f"{path}, line {number}", line) if wanted(number - 1) else None


def json_line(place: str, line: str) -> Row | UserError:
    """The row of a line, or what is wrong with it."""
    try:
        row = DECODER.decode(line.rstrip("\n"))
    except (ValueError, RecursionError) as error:
        return not_json(error, place, line)
    return checked(row, place, line)


def json_list(path: Path, file: IO[str], wanted: Callable[[int], bool]) -> Iterator[Row | UserError | None]:
    """A JSON list of objects with content, or what is wrong with one of them."""
    text = Text(path, file)
    text.take("[")
    number = 0
    if text.peek() != "]":
        while True:
            number += 1
            place = f"{path}, row {number}"
            row, source = text.value(place)
            yield checked(row, place, source) if wanted(number - 1) else None
            if text.peek() == "]":
                break
            text.take(",")
    text.take("]")
    if text.peek():
        raise text.error(json.JSONDecodeError("Extra data", text.buffer, text.position))


class Text:
    """A JSON document of which only the part that is being parsed is in memory."""

    def __init__(self, path: Path, file: IO[str]) -> None:
        self.path, self.file = path, file
        self.buffer, self.position, self.over = "", 0, False
        self.line, self.column = 1, 1  # of the beginning of the buffer

    def peek(self) -> str:
        """The next character that is no whitespace; "" at the end."""
        while True:
            match = SPACE.match(self.buffer, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.buffer) or not self.more():
                return self.buffer[self.position : self.position + 1]

    def take(self, character: str) -> None:
        """Go past a character that must come next."""
        if self.peek() != character:
            raise self.error(json.JSONDecodeError(f"Expecting {character!r} delimiter", self.buffer, self.position))
        self.position += 1

    def value(self, name: str) -> tuple[Any, str]:
        """The next value, which errors call ``name``, and the text that it was parsed from.

        A UserError in place of a value says why it is refused, where the document can be read on behind it.

        Raises:
            UserError: If the document is damaged.
        """
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.buffer, self.position)
            except json.JSONDecodeError as error:
                half = error.msg.startswith("Unterminated string") or error.pos > len(self.buffer) - LONGEST_HALF
                found = self.error(error)
                if not (half and self.more()):
                    raise found from error
                continue
            except (ValueError, RecursionError) as error:
                if not self.skip():
                    raise not_json(error, name) from error
                return not_json(error, name), ""
            if end < len(self.buffer) or not self.more():  # 12 may be the beginning of 123
                source, self.position = self.buffer[self.position : end], end
                return value, source

    def skip(self) -> bool:
        """Go past a value that is JSON but no row, such as an object with a key twice; False if its end is not found."""
        while True:
            try:
                _, self.position = LENIENT.raw_decode(self.buffer, self.position)
                return True
            except json.JSONDecodeError:
                if not self.more():
                    return False
            except (ValueError, RecursionError):
                return False

    def more(self) -> bool:
        """Read on, by as much again as is being parsed, and forget what has been parsed; False at the end of the file."""
        if self.over:
            return False
        self.line, self.column = self.place(self.position)
        self.buffer, self.position = self.buffer[self.position :], 0
        chunk = self.file.read(max(CHUNK, len(self.buffer)))
        self.buffer, self.over = self.buffer + chunk, not chunk
        return not self.over

    def place(self, position: int) -> tuple[int, int]:
        """Line and column of the file, from 1."""
        lines = self.buffer.count("\n", 0, position)
        if not lines:
            return self.line, self.column + position
        return self.line + lines, position - self.buffer.rfind("\n", 0, position)

    def error(self, error: json.JSONDecodeError) -> UserError:
        """The error with its place in the file, and the beginning of what is being parsed."""
        line, column = self.place(error.pos)
        return not_json(error, f"{self.path}, line {line}", self.buffer[self.position :][:60], column)


def not_json(error: Exception, place: str, text: str = "", column: int | None = None) -> UserError:
    """What is wrong with a text that should be JSON."""
    if isinstance(error, json.JSONDecodeError):
        return UserError(f"{place}, character {column or error.colno}: not JSON ({error.msg}): {text.strip()[:60]!r}")
    if isinstance(error, RecursionError):
        return UserError(f"{place}: lists or objects are nested too deeply to be read")
    return UserError(f"{place}: {error}")


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
LENIENT = json.JSONDecoder(parse_int=str)


def checked(row: Any, place: str, source: str) -> Row | UserError:
    """The row, or what is wrong with it."""
    if isinstance(row, UserError):
        return row
    try:
        return check_row(row, place, source)
    except UserError as error:
        return error


def check_row(row: Any, place: str, source: str) -> Row:
    """The row, an object in which something is said; halves of surrogate pairs are no characters."""
    if not isinstance(row, dict):
        raise UserError(f"{place}: a row must be an object {{column: value}}, not {type(row).__name__} {row!r:.40}")
    if all(value in (None, "", [], {}) for value in row.values()):
        raise UserError(f"{place}: the row is empty; columns {', '.join(row) or '(none)'}")
    if SURROGATE.search(source):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise UserError(f"{place}: {half} is half of a surrogate pair and no character; remove it") from error
    return row
