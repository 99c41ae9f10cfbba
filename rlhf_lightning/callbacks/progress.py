"""The progress bar: which method, how long still, and the two or three figures that matter."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from rlhf_lightning.modules.plan import RunPlan


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

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {k: v for k, v in metrics.items() if k != "v_num" and not str(k).startswith(("eval/", "test/"))}
