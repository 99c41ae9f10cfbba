"""Rows written as an Arrow table block by block: in memory while they are few, in a mapped file once they are many."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType

import pyarrow as pa
from datasets import Dataset, Features
from datasets.table import table_cast

from rlhf_lightning.data.rows import Row
from rlhf_lightning.data.shapes import NULL, Shape, from_arrow, join, shape_of, to_arrow
from rlhf_lightning.errors import UserError

# Rows of this size stay in memory; more of them are written to disk.
HELD_BYTES = 32 * 2**20
# A block is what is held as Python objects, which take about five times as much.
BLOCK_BYTES = 4 * 2**20
BLOCK_ROWS = 4096


def from_rows(rows: Iterable[Row]) -> Dataset:
    """Rows as a dataset in memory, with every column that one of them has, null where it is absent; kinds may mix."""
    return collected(lambda writer: writer.extend(rows))


def collected(fill: "Callable[[RowWriter], None]", given: Features | None = None) -> Dataset:
    """The rows that ``fill`` writes, in memory."""
    writer = RowWriter(None, given)
    fill(writer)
    made = writer.finish()
    assert isinstance(made, pa.Table)
    return Dataset(made)


class Piece:
    """Tables of one schema, one after the other: in memory, or in a file."""

    def __init__(self, shapes: dict[str, Shape]) -> None:
        self.shapes = shapes
        self.tables: list[pa.Table] = []
        self.path: Path | None = None

    def __iter__(self) -> Iterator[pa.Table]:
        yield from self.tables
        if self.path is not None:
            with pa.memory_map(str(self.path)) as file, pa.ipc.open_stream(file) as stream:
                for batch in stream:
                    yield pa.Table.from_batches([batch])


class RowWriter:
    """Takes rows and makes a dataset of them; the types of the columns come from all rows.

    Rows that need wider columns than those before begin another piece. At the end the earlier pieces are widened: most
    tables are of one piece, and no file is read twice.
    """

    first_block = 64  # rows; how large they are is known after it

    def __init__(self, make_folder: Callable[[], Path] | None, given: Features | None = None) -> None:
        """Write nothing yet.

        Args:
            make_folder: Gives an empty folder once the rows are too many for memory; None to keep any number there.
            given: Columns that come as Arrow columns, see :meth:`write`.
        """
        self.make_folder, self.given = make_folder, given or Features()
        self.folder: Path | None = None
        self.shapes: dict[str, Shape] = {}
        self.pieces: list[Piece] = []
        self.rows_a_block, self.held, self.rows = self.first_block, 0, 0
        self.sink: pa.ipc.RecordBatchStreamWriter | None = None

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def extend(self, rows: Iterable[Row]) -> None:
        """Take rows one after the other, in blocks of a size that suits them."""
        rows = iter(rows)
        while block := list(islice(rows, self.rows_a_block)):
            self.write(block)

    def write(self, rows: Sequence[Row], given: pa.Table | None = None) -> None:
        """A block of rows, and the Arrow columns that stand beside them."""
        names = dict.fromkeys([*self.shapes, *(name for row in rows for name in row)])
        columns = {name: [row.get(name) for row in rows] for name in names}
        wider = {name: join(self.shapes.get(name, NULL), shape_of(values)) for name, values in columns.items()}
        if wider != self.shapes or not self.pieces:
            self._close()
            self.shapes = wider
            self.pieces.append(Piece(wider))
        table = beside(to_arrow(columns, wider), given, self.given)
        self._put(table)
        self.rows += len(rows)
        size = max(1, self.rows_a_block * BLOCK_BYTES // max(1, table.nbytes))
        self.rows_a_block = min(size, 4 * self.rows_a_block, BLOCK_ROWS)

    def finish(self) -> pa.Table | Path:
        """All rows, or the file that holds them."""
        self._close()
        if len(self.pieces) > 1:
            old, self.pieces, self.held = self.pieces, [Piece(self.shapes)], 0
            for piece in old:
                for table in piece:
                    self._put(self._widened(table, piece.shapes))
                if piece.path is not None:
                    piece.path.unlink()
            self._close()
        if not self.pieces:
            return pa.table({})
        (whole,) = self.pieces
        return whole.path or pa.concat_tables(whole)

    def _put(self, table: pa.Table) -> None:
        """Add a block to the last piece; in memory while all together is small."""
        piece = self.pieces[-1]
        self.held += table.nbytes
        piece.tables.append(table)
        if self.make_folder is None or (self.held <= HELD_BYTES and self.sink is None):
            return
        self.folder = self.folder or self.make_folder()
        try:
            if self.sink is None:
                piece.path = self.folder / f"{len(list(self.folder.iterdir()))}.arrow"
                self.sink = pa.ipc.new_stream(str(piece.path), table.schema)
            for waiting in piece.tables:
                self.sink.write_table(waiting)
        except OSError as error:
            raise UserError(f"rows can't be written to {self.folder.parent}: {error}") from error
        piece.tables = []

    def _widened(self, table: pa.Table, old: dict[str, Shape]) -> pa.Table:
        """A block of an earlier piece in the columns that the whole has."""
        changed = {name: shape for name, shape in self.shapes.items() if shape != old.get(name)}
        values = {name: from_arrow(table[name], old[name]) if name in old else [None] * len(table) for name in changed}
        new = to_arrow(values, changed)
        kept = table.select([name for name in table.column_names if name in old and name not in changed])
        columns = {name: new[name] if name in changed else kept[name] for name in self.shapes}
        schema = to_arrow({name: [] for name in self.shapes}, self.shapes).schema
        return beside(pa.table(columns, schema=schema), table, self.given)

    def _close(self) -> None:
        if self.sink is not None:
            self.sink.close()
            self.sink = None


def beside(table: pa.Table, others: pa.Table | None, features: Features) -> pa.Table:
    """A table with the columns ``features`` of another one beside its own."""
    if others is None or not features:
        return table
    whole = Features({**Features.from_arrow_schema(table.schema), **features})
    columns = [*table.columns, *(others[name] for name in features)]
    return table_cast(pa.table(columns, names=list(whole)), whole.arrow_schema)
