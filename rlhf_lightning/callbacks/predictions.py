"""What ``predict`` leaves behind: one line of JSON a sample."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter


def json_line(row: dict[str, Any]) -> str:
    """A row as JSON that any reader splits into the same lines and any terminal shows: what is not printable is escaped."""
    text = json.dumps(row, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


class PredictionLines(BasePredictionWriter):
    """Writes prompt, response and score of every prediction to ``predictions.jsonl`` in the run's folder."""

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
            for sample in prediction:
                file.write(json_line(sample.columns()) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            print(self.path(trainer.default_root_dir))
