"""Files whose training rows are read while a run goes on, never all of them at once, and never written anywhere."""

import glob
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, DatasetDict, Features
from datasets.table import table_cast

from rlhf_lightning.data.files import LOADER_ERRORS, ReadOptions, file_type, load_path, root_cause
from rlhf_lightning.data.json_files import json_rows
from rlhf_lightning.data.nested import has_struct, without_padding
from rlhf_lightning.data.paths import KINDS, existing
from rlhf_lightning.data.rows import Row
from rlhf_lightning.data.sources import Kind, Source, name_splits
from rlhf_lightning.errors import UserError

STREAMED = tuple(ending for ending, kind in KINDS.items() if kind in ("json", "parquet", "arrow"))
BATCH = 256  # rows of a table decoded together


class StreamSource(Source):
    """Files in .json, .jsonl (also .gz), .parquet or .arrow, read from first to last in every epoch and shuffled in windows.

    For training rows that neither memory nor the disk's cache is to hold. ``trainer.max_steps``, ``trainer.max_time`` or, of a
    method that samples, ``model.iterations`` must say where the run ends.
    """

    def __init__(self, path: str | list[str], validation_path: str | None = None, window_rows: int = 16384) -> None:
        """Remember where to look.

        Args:
            path: File, folder or pattern such as ``"shards/*.jsonl"``, or a list of these; files of a folder or pattern are
                read in the order of their names.
            validation_path: File or folder of validation rows; these are loaded whole, as from :class:`.FileSource`.
            window_rows: So many rows are in memory, tokenized, to be shuffled and sorted by length among themselves; rounded
                up to whole optimizer steps.
        """
        if window_rows < 1:
            raise UserError(f"source.window_rows is {window_rows}; it must be at least 1")
        self.path, self.validation_path, self.window_rows = path, validation_path, window_rows

    def __str__(self) -> str:
        return self.path if isinstance(self.path, str) else ", ".join(self.path)

    def load(self, kind: Kind) -> DatasetDict:
        """See :class:`Source`: the validation rows, if there are any."""
        if self.validation_path is None:
            return DatasetDict()
        held_out = load_path(existing(self.validation_path), ReadOptions(mark_bad=True))
        return DatasetDict({"validation": name_splits(held_out, self.validation_path)["train"]})

    def files(self) -> list[Path]:
        """The files in the order in which they are read.

        Raises:
            UserError: If there is none, one is empty, or one is of another type.
        """
        found = [file for path in ([self.path] if isinstance(self.path, str) else self.path) for file in files_of(path)]
        for file in found:
            if file_type(file) not in STREAMED:
                raise UserError(f"{file}: such a file can't be streamed; accepted are {', '.join(STREAMED)}")
            if not file.stat().st_size:
                raise UserError(f"{file} is empty")
        return found


def files_of(path: str) -> list[Path]:
    """The files that a path or pattern names, by name.

    Raises:
        UserError: If there is none.
    """
    expanded = Path(path).expanduser()
    if expanded.is_file():
        return [expanded]
    candidates = expanded.rglob("*") if expanded.is_dir() else map(Path, glob.iglob(str(expanded), recursive=True))
    found = sorted(file for file in candidates if file.is_file() and file.name.lower().endswith(STREAMED))
    if not found:
        raise UserError(
            f"{path}: no file to stream (working directory {Path.cwd()}); accepted are {', '.join(STREAMED)}"
        )
    return found


def stream_rows(path: Path, wanted: Callable[[int], bool], mark_bad: bool = False) -> Iterator[Row | None]:
    """The rows of one file, one after the other; None for a row whose number, from 0, is not wanted.

    Args:
        path: The file.
        wanted: Says which rows are wanted.
        mark_bad: See :func:`.json_rows`.

    Raises:
        UserError: If it is damaged.
    """
    kind = KINDS[file_type(path)]
    try:
        if kind == "json":
            yield from json_rows(path, wanted, mark_bad)
            return
        first = 0
        for count, read in parquet_parts(path) if kind == "parquet" else arrow_parts(path):
            if not any(map(wanted, range(first, first + count))):
                yield from repeat(None, count)
                first += count
                continue
            for table in read():
                numbers = range(first, first + len(table))
                rows = decoded(table) if any(map(wanted, numbers)) else repeat(None)
                yield from (row if wanted(number) else None for number, row in zip(numbers, rows, strict=False))
                first += len(table)
    except LOADER_ERRORS as error:
        raise UserError(f"{path} can't be read as {kind}: {root_cause(error)}") from error


Part = tuple[int, Callable[[], Iterator[pa.Table]]]


def parquet_parts(path: Path) -> Iterator[Part]:
    """The row groups of a file: how many rows each has, and how to read them."""
    with pyarrow.parquet.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield file.metadata.row_group(group).num_rows, partial(row_group, file, group)


def row_group(file: pyarrow.parquet.ParquetFile, group: int) -> Iterator[pa.Table]:
    """The rows of one group in pieces."""
    for batch in file.iter_batches(BATCH, row_groups=[group]):
        yield pa.Table.from_batches([batch], schema=file.schema_arrow)


def arrow_parts(path: Path) -> Iterator[Part]:
    """The batches of a file, mapped."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        for batch in stream:
            table = pa.Table.from_batches([batch])
            yield len(table), partial(slices, table)


def slices(table: pa.Table) -> Iterator[pa.Table]:
    """A table in pieces."""
    return (table.slice(start, BATCH) for start in range(0, len(table), BATCH))


def decoded(table: pa.Table) -> list[Row]:
    """The rows of a table as Python values."""
    features = Features.from_arrow_schema(table.schema)
    rows = Dataset(table_cast(table, features.arrow_schema), fingerprint="streamed")
    structs = [name for name, feature in features.items() if has_struct(feature)]
    values = rows.to_list()
    for row in values:
        row.update({name: without_padding(row[name], features[name]) for name in structs})
    return values
