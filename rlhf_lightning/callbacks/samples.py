"""Every so often, show what the model says: a panel in the terminal and a table in W&B."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_lightning.callbacks.loggers import log_samples
from rlhf_lightning.errors import harmless
from rlhf_lightning.modules.guard import plain_data
from rlhf_lightning.modules.showing import Sample

COLUMNS = ["step", "query", "model response", "score"]


class SampleTable(Callback):
    """Reward may go up for the wrong reason; only the samples tell."""

    def __init__(self, every_n_steps: int = 100, count: int = 4) -> None:
        """Remember how often and how many.

        Args:
            every_n_steps: Batches (PPO: iterations) between two tables of samples; 0 for none.
            count: Number of samples in a table.
        """
        self.every_n_steps, self.count = every_n_steps, count
        self.rows: list[list[Any]] = []
        self._batch: Any = None
        self._fields: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The rows shown so far, and the prompts to show again."""
        return {"rows": self.rows, "batch": plain_data(self._batch) if self._batch is not None else self._fields}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self._fields = state_dict["rows"], state_dict["batch"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if self.every_n_steps and (done % self.every_n_steps == 0 or done == 1):
            self._show(trainer, pl_module, batch, done)

    @torch.no_grad()
    def _show(self, trainer: Trainer, pl_module: Any, batch: Any, step: int) -> None:
        if self._batch is None and isinstance(self._fields, dict) and hasattr(batch, "_make"):
            kept = type(batch)(**self._fields)
            self._batch = pl_module.transfer_batch_to_device(kept, pl_module.device, 0)
        self._batch = self._batch if self._batch is not None else batch  # the same prompts every time
        samples = pl_module.show(self._batch, self.count)
        self.rows += [
            [step, sample.prompt, labelled(sample), sample.score, *([sample.extra] if sample.extra else [])]
            for sample in samples
        ]
        columns, rows = as_table(self.rows)
        for logger in trainer.loggers:
            log_samples(logger, columns, rows, trainer.global_step)
        self._print(samples, f"{type(pl_module).__name__}, step {step}")

    @rank_zero_only
    def _print(self, samples: list[Sample], title: str) -> None:
        Console().print(sample_panel(samples, title))


def as_table(rows: list[list[Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and cells of rows with ``COLUMNS``, and further columns by name where a row has them."""
    extra = [row[len(COLUMNS)] if len(row) > len(COLUMNS) else {} for row in rows]
    names = sorted({name for columns in extra for name in columns})
    cells = [[*row[: len(COLUMNS)], *map(columns.get, names)] for row, columns in zip(rows, extra, strict=True)]
    return [*COLUMNS, *names], cells


def sample_panel(samples: list[Sample], title: str) -> Table:
    """A table of samples; text is shown as text, whatever markup or control characters it holds."""
    table = Table(title=title, title_justify="left", expand=True)
    table.add_column("prompt", ratio=2)
    table.add_column("response", ratio=3)
    table.add_column("score", justify="right", width=8)
    names = sorted({name for sample in samples for name in sample.extra})
    for name in names:
        table.add_column(plain(name))
    for sample in samples:
        extra = [plain(str(sample.extra.get(name, ""))) for name in names]
        table.add_row(plain(sample.prompt), plain(labelled(sample)), f"{sample.score:.2f}", *extra)
    return table


def labelled(sample: Sample) -> str:
    """A response behind what it is of its row: chosen, rejected, its rank."""
    return sample.response if sample.side is None else f"{sample.side}: {sample.response}"


def plain(text: str) -> Text:
    """Text without markup and without terminal escapes: what is not printable is shown as its code."""
    return Text(harmless(text))
