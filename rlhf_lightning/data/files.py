"""Local files and folders as datasets: every type gives the same rows, and no type guesses what text means."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetsError

from rlhf_lightning.data.cache import cache_folder, cached_rows
from rlhf_lightning.data.csv_files import read_csv
from rlhf_lightning.data.json_files import read_json
from rlhf_lightning.data.paths import KINDS, READABLE
from rlhf_lightning.data.rows import Row
from rlhf_lightning.data.tables import from_rows as from_rows
from rlhf_lightning.data.text_files import read_stories
from rlhf_lightning.errors import UserError

# What is raised over a damaged file, or one whose columns hold values that do not go together.
LOADER_ERRORS = (
    DatasetsError,
    pa.ArrowException,
    ValueError,
    OSError,
    KeyError,
    TypeError,
    OverflowError,
    RuntimeError,  # a folder that brings a loading script; nesting without end
)


@dataclass(frozen=True)
class ReadOptions:
    """How files are read.

    Attributes:
        text_separator: Between the texts of a text file; None for blank lines.
        mark_bad: Whether rows that can't be read are marked, see :func:`.bad_row`, or refused.
        text: Columns of CSV that hold text whatever it looks like.
    """

    text_separator: str | None = None
    mark_bad: bool = False
    text: tuple[str, ...] = ()


# Of a dataset that was just loaded, the files that its rows are read from.
FILES: WeakKeyDictionary[Dataset, tuple[tuple[Path, ...], str | None]] = WeakKeyDictionary()


def file_type(path: Path) -> str:
    """The ending that says how to read a file: the last, or the last two if it is compressed."""
    name = path.name.lower()
    matches = [ending for ending in READABLE if name.endswith(ending)]
    if not matches:
        raise UserError(f"{path}: can't read a '{path.suffix}' file; accepted are {', '.join(READABLE)}")
    return max(matches, key=len)


def load_path(path: Path, options: ReadOptions) -> DatasetDict:
    """Every split in a file or folder, under the names that it gives them.

    Raises:
        UserError: If it is empty, damaged (names the line where there is one) or of an unknown type.
    """
    splits = load_folder(path, options) if path.is_dir() else DatasetDict({"train": load_files([path], path, options)})
    for name, rows in splits.items():
        if not len(rows):
            raise UserError(f"{path} has no rows" + (f" in split '{name}'" if len(splits) > 1 else ""))
    return splits


def load_files(files: Sequence[Path], origin: Path, options: ReadOptions) -> Dataset:
    """The rows of files of one type; ``origin`` is what the user named.

    Raises:
        UserError: If one is empty or damaged.
    """
    for file in files:
        if not file.stat().st_size:
            raise UserError(f"{file} is empty")
    rows = read_files(files, origin, options)
    FILES[rows] = tuple(files), options.text_separator
    return rows


def read_files(files: Sequence[Path], origin: Path, options: ReadOptions) -> Dataset:
    """The rows of files that hold something."""
    kind = KINDS[file_type(files[0])]
    try:
        if kind in ("json", "csv", "text"):
            rows = chain.from_iterable(read_rows(file, options) for file in files)
            key = {"files": content_hash(files), "kind": file_type(files[0]), **asdict(options)}
            return cached_rows(lambda writer: writer.extend(rows), key)
        if kind == "arrow":
            return concatenate_datasets([Dataset.from_file(str(file)) for file in files])
        # datasets would answer from its cache for a file of the same name and time, whatever is in it now.
        cache = cache_folder() / f"{kind}-{content_hash(files)}"
        names = [str(file) for file in files]
        return as_dataset(load_dataset(kind, data_files=names, split="train", cache_dir=str(cache)))
    except LOADER_ERRORS as error:
        raise UserError(f"{origin} can't be read as {kind}: {root_cause(error)}") from error


def read_rows(path: Path, options: ReadOptions) -> Iterator[Row]:
    """The rows of a file of text, one after the other.

    Raises:
        UserError: If it is damaged; names the line.
    """
    kind = KINDS[file_type(path)]
    if kind == "text":
        return read_stories(path, options.text_separator)
    if kind == "csv":
        return read_csv(path, options.mark_bad, options.text)
    return read_json(path, options.mark_bad)


@cache
def count_rows(path: Path, text_separator: str | None) -> int:
    """How many rows a file has, bad ones included."""
    kind = KINDS[file_type(path)]
    if kind == "parquet":
        return pyarrow.parquet.read_metadata(path).num_rows
    if kind == "arrow":
        return len(Dataset.from_file(str(path)))
    return sum(1 for _ in read_rows(path, ReadOptions(text_separator, mark_bad=True)))


def content_hash(files: Sequence[Path]) -> str:
    """Of what is in the files."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:32]


def load_folder(path: Path, options: ReadOptions) -> DatasetDict:
    """A folder that ``save_to_disk`` wrote, or one of data files, whose names may tell splits apart."""
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = load_from_disk(path)
            return saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        endings = {file_type(file) for file in files if file.name.lower().endswith(READABLE)}
        if not endings:
            raise UserError(f"{path}: no data in this folder; accepted are {', '.join(READABLE)}")
        if len({KINDS[ending] for ending in endings}) > 1:
            raise UserError(f"{path}: files of different types ({', '.join(sorted(endings))}); name one of them")
        found = load_dataset_builder(str(path)).config.data_files  # knows what file names and dataset cards mean
    except LOADER_ERRORS as error:
        raise UserError(f"{path} can't be read as a dataset: {root_cause(error)}") from error
    return DatasetDict(
        {str(split): load_files([Path(file) for file in files], path, options) for split, files in found.items()}
    )


def as_dataset(loaded: Any) -> Dataset:
    """A map-style dataset, which is what a loader gives when it is asked for one split."""
    if not isinstance(loaded, Dataset):
        raise TypeError(f"expected a Dataset, got {type(loaded).__name__}")
    return loaded


def root_cause(error: BaseException) -> str:
    """The first line of the innermost error: the loaders wrap theirs several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
