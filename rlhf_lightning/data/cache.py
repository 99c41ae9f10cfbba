"""Rows kept on disk, to be mapped into memory, under a name made of everything they depend on."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, load_from_disk

from rlhf_lightning.data.tables import RowWriter
from rlhf_lightning.errors import UserError

log = logging.getLogger(__name__)

CACHE_VARIABLE = "RLHF_LIGHTNING_CACHE"
ROW_COUNT = "row_count"  # a file beside the rows with their number
# Starting processes costs more than tokenizing fewer rows than this.
ROWS_PER_PROCESS = 20_000


def cache_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """Where results are kept: as given, else ``$RLHF_LIGHTNING_CACHE``, else ``~/.cache/rlhf_lightning``."""
    return Path(given or os.environ.get(CACHE_VARIABLE) or "~/.cache/rlhf_lightning").expanduser()


def dataset_hash(dataset: Dataset) -> str:
    """A hash of the rows and their types, wherever they came from."""
    digest = hashlib.sha256(repr(dataset.features).encode())
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        sink = pa.BufferOutputStream()
        table = batch.combine_chunks().replace_schema_metadata(None)
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        digest.update(sink.getvalue())
    return digest.hexdigest()


def code_hash() -> str:
    """A hash of this package's sources for data: a change there makes other results, under other names."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def place_of(key: dict[str, Any], cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder for what depends on the key and on this package's code."""
    whole = json.dumps({**key, "code": code_hash()}, sort_keys=True)
    return cache_folder(cache_dir) / hashlib.sha256(whole.encode()).hexdigest()[:32]


@contextmanager
def working_beside(target: Path) -> Iterator[Path]:
    """A folder of one's own to write in, removed afterwards.

    Raises:
        UserError: If it can't be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="writing-", dir=target.parent))
    except OSError as error:
        raise UserError(f"cache folder {target.parent} can't be written ({error}); set {CACHE_VARIABLE}") from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def cached_map(
    dataset: Dataset,
    function: Callable[[dict[str, list[Any]], list[int]], dict[str, list[Any]]],
    *,
    features: Features,
    settings: dict[str, Any],
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """``function`` over batches of rows, once: later calls with the same rows and settings read the result from disk.

    Args:
        dataset: Rows.
        function: From a batch of columns and the indices of its rows to the new columns, of more rows or fewer; nothing else
            of the row is kept.
        features: Types of the new columns.
        settings: What the result depends on beside rows and code; plain data.
        cache_dir: See :func:`cache_folder`.

    Raises:
        UserError: If the cache folder can't be written.
    """
    target = place_of({"rows": dataset_hash(dataset), "settings": settings, "features": repr(features)}, cache_dir)
    cached = read_cached(target, features)
    if cached is not None:
        return cached
    with working_beside(target) as work:
        processes = min(len(dataset) // ROWS_PER_PROCESS, len(os.sched_getaffinity(0)))
        mapped = dataset.map(
            function,
            batched=True,
            with_indices=True,
            remove_columns=dataset.column_names,
            features=features,
            cache_file_name=str(work / "rows.arrow"),
            new_fingerprint=target.name,  # spares pickling the tokenizer only to hash it
            num_proc=processes if processes > 1 else None,
            desc="tokenizing",
        )
        mapped.save_to_disk(work / "dataset")
        (work / "dataset" / ROW_COUNT).write_text(str(len(mapped)))
        publish(work / "dataset", target)
    return load_from_disk(target)


def cached_rows(fill: Callable[[RowWriter], None], key: dict[str, Any], given: Features | None = None) -> Dataset:
    """The rows that ``fill`` writes: few of them in memory, many in a file that is mapped, and written once.

    Args:
        fill: Writes them.
        key: What they depend on beside code; plain data.
        given: See :class:`RowWriter`.

    Raises:
        UserError: If the cache folder can't be written.
    """
    target = place_of(key)
    cached = read_mapped(target)
    if cached is not None:
        return cached
    with ExitStack() as stack:
        writer = stack.enter_context(RowWriter(lambda: stack.enter_context(working_beside(target)), given))
        fill(writer)
        made = writer.finish()
        if isinstance(made, pa.Table):
            return Dataset(made)
        whole = made.parent / "whole"
        whole.mkdir()
        made.rename(whole / f"{writer.rows}.arrow")
        publish(whole, target)
    return Dataset.from_file(str(next(target.iterdir())))


def read_mapped(target: Path) -> Dataset | None:
    """Rows that were written before, in a file that is named by their number; None where there are none."""
    for path in target.glob("*.arrow"):
        try:
            cached = Dataset.from_file(str(path))
            if len(cached) == int(path.stem):
                return cached
            reason = f"{len(cached)} rows where {path.stem} belong"
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            reason = str(error)
        discard(target, reason)
    return None


def read_cached(target: Path, features: Features) -> Dataset | None:
    """The result of an earlier call; None where there is none, or it can't be read (it is then removed)."""
    if not target.exists():
        return None
    try:
        cached, rows = load_from_disk(target), int((target / ROW_COUNT).read_text())
        if len(cached) == rows and set(cached.column_names) == set(features):
            return cached
        reason = f"{len(cached)} rows where {rows} belong"
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        reason = str(error)
    discard(target, reason)
    return None


def discard(target: Path, reason: str) -> None:
    """Remove what can't be read, aloud."""
    log.warning("cached rows at %s are damaged (%s); making them anew", target, reason)
    shutil.rmtree(target)


def publish(source: Path, target: Path) -> None:
    """Move a finished result to its place in one step; another process may have been first, with the same rows."""
    try:
        source.rename(target)
    except OSError:
        if not target.exists():
            raise
