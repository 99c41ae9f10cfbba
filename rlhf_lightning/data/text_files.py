"""Text files read piece by piece, decompressed, with an error that names what is wrong with their bytes."""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rlhf_lightning.data.rows import Row
from rlhf_lightning.errors import UserError

# Characters read at a time where lines may be as long as the file.
CHUNK = 2**20


def opener(path: Path) -> Any:
    """What opens the file, decompressed if its name ends in .gz."""
    return gzip.open if path.suffix.lower() == ".gz" else open


@contextmanager
def reading(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """A text file, decompressed if its name ends in .gz.

    Args:
        path: The file.
        newline: As in ``open``; in CSV, whose fields may hold some, line ends stay as they are.

    Raises:
        UserError: If the file is not UTF-8 or not whole.
    """
    try:
        with opener(path)(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {first_bad_line(path)}: not UTF-8 text ({error.reason})") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path} is not a complete gzip file: {error}") from error


def first_bad_line(path: Path) -> int:
    """The number of the first line that is not UTF-8; decoding in pieces does not tell."""
    with opener(path)(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise AssertionError("every line is UTF-8")


def read_stories(path: Path, separator: str | None) -> Iterator[Row]:
    """Stories between separators; without a separator, paragraphs between blank lines. Blank ones are left out."""
    divider, rest = "\n\n" if separator is None else separator, ""
    with reading(path) as file:
        while chunk := file.read(CHUNK):
            *whole, rest = (rest + chunk).split(divider)
            yield from ({"text": story.strip()} for story in whole if story.strip())
    if rest.strip():
        yield {"text": rest.strip()}
