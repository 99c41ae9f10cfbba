"""The progress bar: which method, how long still, and the two or three figures that matter."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import TimeRemainingColumn
from rich.table import Column

from rlhf_lightning.modules.plan import RunPlan

WIDE = 110  # columns of a terminal in which everything fits
# What the bar calls metrics, so that they fit beside it; they are logged under their own names.
LABELS = {
    "mean_token_accuracy": "acc",
    "accuracy": "acc",
    "accuracies": "acc",
    "margins": "margin",
    "scores": "score",
    "length": "len",
    "mean_length": "len",
}


class RunProgress(RichProgressBar):
    """Lightning's rich bar, named after the method, without the logger's version and the validation's long list."""

    @property
    def module(self) -> Any:
        """The one in training."""
        return self.trainer.lightning_module

    @property
    def iterations(self) -> int | None:
        """Iterations of the complete run, of a method that samples; None where the bar counts batches of an epoch."""
        plan = getattr(self.module, "plan", None)
        return plan.iterations if isinstance(plan, RunPlan) else None

    @property
    def total_train_batches(self) -> int | float:
        return super().total_train_batches if self.iterations is None else self.iterations

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.iterations is None or self.train_progress_bar_id is None:  # iterations have one bar for all epochs
            super().on_train_epoch_start(trainer, pl_module)
        if self.iterations is not None:
            self._update(self.train_progress_bar_id, self.module.iteration)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1 if self.iterations is None else self.module.iteration
        super().on_train_batch_end(trainer, pl_module, outputs, batch, done - 1)

    def _get_train_description(self, current_epoch: int) -> str:
        method = type(self.module).__name__.removesuffix("Module")
        if self.iterations is not None:
            return f"{method} iteration"
        epochs = self.trainer.max_epochs or -1
        return f"{method} epoch {current_epoch + 1}" + (f"/{epochs}" if epochs > 0 else "")

    def _init_progress(self, trainer: Trainer) -> None:
        super()._init_progress(trainer)
        if self._metric_component is not None:  # cut off rather than wrapped, whatever is logged
            self._metric_component._table_column = Column(no_wrap=True)

    def configure_columns(self, trainer: Trainer) -> list:
        """Lightning's columns; in a narrow terminal without what the metrics need more."""
        description, bar, count, _, speed = super().configure_columns(trainer)
        narrow = self._console is not None and self._console.width < WIDE
        bar.bar_width = 4 if narrow else 20
        return [description, bar, count, RemainingTime(), *([] if narrow else [speed])]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        names = [name for name in metrics if name != "v_num" and not str(name).startswith(("eval/", "test/"))]
        return {LABELS.get(name, name): rounded(metrics[name]) for name in names}


class RemainingTime(TimeRemainingColumn):
    """Time until the end of the bar; the time it took, once it is full."""

    def __init__(self) -> None:
        super().__init__(elapsed_when_finished=True)


def rounded(value: Any) -> str:
    """A metric in at most seven characters, of which three are decimals where it is small."""
    if not isinstance(value, int | float):
        return str(value)
    decimals = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0
    return f"{value:.{decimals}f}" if abs(value) < 1e5 else f"{value:.1e}"
