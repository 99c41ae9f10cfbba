"""What ``predict`` leaves behind: one line of JSON a sample."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from rlhf_lightning.data.module import RowsDataModule
from rlhf_lightning.data.sampler import BatchPlan
from rlhf_lightning.modules.showing import Sample


def json_line(row: dict[str, Any]) -> str:
    """A row as JSON that any reader splits into the same lines and any terminal shows: what is not printable is escaped."""
    text = json.dumps(row, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def source_rows(trainer: Trainer, batch_indices: Any) -> list[int] | None:
    """Where the rows of a batch are in their source; None where the data module is not one of ours."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    if not isinstance(batch_indices, BatchPlan) or not isinstance(datamodule, RowsDataModule):
        return None
    return datamodule.predicted_rows(batch_indices.rows)


def columns(sample: Sample, place: int, rows: list[int] | None) -> dict[str, Any]:
    """The columns of one line.

    Args:
        sample: The prediction.
        place: Its index among those of its batch.
        rows: Where each row of the batch is in its source.
    """
    row = place if sample.row is None else sample.row
    line = {**sample.extra, "row": None if rows is None else rows[row], "side": sample.side}
    line |= {name: getattr(sample, name) for name in ("prompt", "response", "score")}
    return line if sample.step_scores is None else line | {"step_scores": sample.step_scores}


class PredictionLines(BasePredictionWriter):
    """Writes every prediction to ``predictions.jsonl`` in the run's folder.

    Columns: ``row``, the index of the row in its file, or in the held-out split that its source has, from 0 on; ``side``,
    which of the row's responses it is ("chosen", "rejected", "rank 2", "right", "wrong"; null for a sampled one); ``prompt``,
    ``response``, ``score``; of process rewards also ``step_scores``, of the labelled steps;
    and the columns that a reward has logged.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    @staticmethod
    def path(folder: str | Path, rank: int = 0) -> Path:
        """Where the lines go; every rank has a file of its own."""
        return Path(folder, f"predictions{f'-{rank}' if rank else ''}.jsonl")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = self.path(trainer.default_root_dir, trainer.global_rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        with self.path(trainer.default_root_dir, trainer.global_rank).open("a", encoding="utf-8") as file:
            rows = source_rows(trainer, batch_indices)
            for place, sample in enumerate(prediction):
                file.write(json_line(columns(sample, place, rows)) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            print(self.path(trainer.default_root_dir))
