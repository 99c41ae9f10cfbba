"""metrics.csv in a run's folder."""

import csv
import io
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from rlhf_lightning.callbacks.disk import disk_error, scratch_of
from rlhf_lightning.errors import UserError

NAME = "metrics.csv"


class RunMetrics(Logger):
    """A row of metrics.csv for every call, written at once; columns in alphabetical order, empty where nothing was logged.

    A run that goes on from a checkpoint goes on with the file, from the last row that the checkpoint had seen.
    """

    def __init__(self, folder: str) -> None:
        """Args: the run's folder."""
        super().__init__()
        self.path = Path(folder, NAME)
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml beside the file has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row.

        Args:
            metrics: Scalars by name.
            step: Optimizer steps so far; a column of its own.

        Raises:
            UserError: If the disk is full.
        """
        row = {name: float(value) for name, value in metrics.items()} | ({} if step is None else {"step": step})
        try:
            self._append(row)
        except OSError as error:
            raise UserError(
                f"{self.path} could not be written: {disk_error(error)}; make room and go on with --ckpt_path last"
            ) from error

    def _append(self, row: dict[str, float]) -> None:
        columns = self._known_columns()
        if not row.keys() <= set(columns):
            self._columns = sorted({*columns, *row})
            self._rewrite(self.rows())
        with self.path.open("a", newline="") as file:
            file.write(as_csv([row], self._known_columns()))

    @rank_zero_only
    def cut(self, rows: int) -> None:
        """Drop what was logged after a checkpoint, a torn last line included.

        Args:
            rows: How many the checkpoint had seen.
        """
        if self.path.exists():
            self._rewrite(self.rows()[:rows])

    def sync(self) -> int:
        """Bring the file to the disk.

        Returns:
            How many rows it has; 0 on ranks that write none.
        """
        if not self.path.exists() or rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            return 0
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
        return len(self.rows())

    def _known_columns(self) -> list[str]:
        if self._columns is None:
            with self.path.open(newline="") if self.path.exists() else io.StringIO() as file:
                self._columns = next(csv.reader(file), [])
        return self._columns

    def rows(self) -> list[dict[str, str]]:
        """What was logged so far, by column; a value is empty where nothing was logged."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        columns, scratch = self._known_columns(), scratch_of(self.path)
        scratch.write_text(as_csv([dict(zip(columns, columns, strict=True)), *rows], columns), newline="")
        os.replace(scratch, self.path)


def as_csv(rows: list[Any], columns: list[str]) -> str:
    """Rows as text; what has no value is empty."""
    text = io.StringIO()
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue()
