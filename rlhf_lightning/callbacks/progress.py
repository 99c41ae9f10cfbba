"""The progress bar: which method, how long still, and the two or three figures that matter."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class RunProgress(RichProgressBar):
    """Lightning's rich bar, named after the method, without the logger's version and the validation's long list."""

    def _get_train_description(self, current_epoch: int) -> str:
        method = type(self.trainer.lightning_module).__name__.removesuffix("Module")
        epochs = self.trainer.max_epochs or -1
        return f"{method} epoch {current_epoch + 1}" + (f"/{epochs}" if epochs > 0 else "")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {k: v for k, v in metrics.items() if k != "v_num" and not str(k).startswith(("eval/", "test/"))}
