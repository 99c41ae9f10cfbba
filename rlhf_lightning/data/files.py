"""Local files and folders as datasets: each type through the loader that ``datasets`` has for it."""

from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from rlhf_lightning.data.validation import check_file
from rlhf_lightning.errors import UserError

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".json.gz": "json",
    ".jsonl.gz": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
# An answer that reads "None" or "NA" is text; only an empty field is missing.
OPTIONS: dict[str, dict[str, Any]] = {".csv": {"keep_default_na": False, "na_values": [""]}}
READABLE = (*BUILDERS, ".arrow", ".txt")
# What the loaders raise over a damaged file; check_file then finds the line.
LOADER_ERRORS = (DatasetsError, pa.ArrowException, ValueError, OSError, KeyError, TypeError)


def file_type(path: Path) -> str:
    """The ending that says how to read a file: the last, or the last two if it is compressed."""
    name = path.name.lower()
    matches = [ending for ending in READABLE if name.endswith(ending)]
    if not matches:
        raise UserError(f"{path}: can't read a '{path.suffix}' file; accepted are {', '.join(READABLE)}")
    return max(matches, key=len)


def load_path(path: Path, text_separator: str | None) -> DatasetDict:
    """Every split in a file or folder, under the names that it gives them.

    Raises:
        UserError: If it is empty, damaged (names the line where there is one) or of an unknown type.
    """
    splits = load_folder(path) if path.is_dir() else DatasetDict({"train": load_file(path, text_separator)})
    for name, rows in splits.items():
        if not len(rows):
            raise UserError(f"{path} has no rows" + (f" in split '{name}'" if len(splits) > 1 else ""))
    return splits


def load_file(path: Path, text_separator: str | None) -> Dataset:
    """The rows of one file."""
    ending = file_type(path)
    if not path.stat().st_size:
        raise UserError(f"{path} is empty")
    if ending == ".txt":
        return load_text(path, text_separator)
    if ending in (".json", ".jsonl", ".json.gz", ".jsonl.gz"):
        check_file(path)  # the loader would skip blank lines and fill empty rows with nulls
    try:
        if ending == ".arrow":
            return Dataset.from_file(str(path))
        files = {"train": str(path)}
        return as_dataset(load_dataset(BUILDERS[ending], data_files=files, split="train", **OPTIONS.get(ending, {})))
    except LOADER_ERRORS as error:
        if ending == ".csv":
            check_file(path)
        raise UserError(f"{path} can't be read as {ending[1:]}: {root_cause(error)}") from error


def load_text(path: Path, separator: str | None) -> Dataset:
    """Stories between separators; without a separator, paragraphs between blank lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): {error.reason}") from error
    stories = [story.strip() for story in text.split("\n\n" if separator is None else separator)]
    return Dataset.from_dict({"text": [story for story in stories if story]})


def load_folder(path: Path) -> DatasetDict:
    """A folder that ``save_to_disk`` wrote, or one of data files, whose names may tell splits apart."""
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = load_from_disk(path)
            return saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        endings = {file_type(file) for file in files if file.name.lower().endswith(READABLE)}
        if not endings:
            raise UserError(f"{path}: no data in this folder; accepted are {', '.join(READABLE)}")
        if len({BUILDERS.get(ending) for ending in endings}) > 1:
            raise UserError(f"{path}: files of different types ({', '.join(sorted(endings))}); name one of them")
        for file in files:
            if file.name.lower().endswith((".json", ".jsonl", ".gz")):
                check_file(file)
        loaded = load_dataset(str(path))
    except LOADER_ERRORS as error:
        raise UserError(f"{path} can't be read as a dataset: {root_cause(error)}") from error
    if not isinstance(loaded, DatasetDict):
        raise UserError(f"{path}: not a folder of splits")
    return loaded


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
