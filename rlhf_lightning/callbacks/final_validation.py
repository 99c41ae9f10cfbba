"""Validation after the last step of every run."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class FinalValidation(Callback):
    """Validates after the last step of a run, if the run has something to validate on.

    Without it, a run that ends in the middle of an epoch, or between two multiples of ``val_check_interval``, would not log
    what its last weights are worth. ``trainer.limit_val_batches: 0`` turns this validation off too.
    """

    def __init__(self) -> None:
        self.validated = False  # whether no training batch has followed the last validation
        self._every: tuple[int | None] | None = None  # check_val_every_n_epoch, to be put back

    def state_dict(self) -> dict[str, Any]:
        return {"validated": self.validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validated = state_dict["validated"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is not None:  # Lightning repeats its check before training where an epoch was complete
            trainer.num_sanity_val_steps = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated = self.validated or not trainer.sanity_checking

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.validated = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.enable_validation or not is_last_batch(trainer):
            return
        # Lightning validates before it stops early, in epochs in which it validates at all.
        self._every = (trainer.check_val_every_n_epoch,)
        trainer.check_val_every_n_epoch = 1
        trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._every is not None:
            (trainer.check_val_every_n_epoch,) = self._every

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate now if the run was over when it was resumed: it was stopped in its last validation.

        Lightning does not return to a validation after the last step.
        """
        if self.validated or not trainer.enable_validation or trainer.interrupted or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        pl_module.to(trainer.strategy.root_device)
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True


def is_last_batch(trainer: Trainer) -> bool:
    """Whether the run ends after the current batch, in a hook that follows its optimizer step."""
    if 0 < trainer.max_steps <= trainer.global_step:
        return True
    if trainer.should_stop and trainer.fit_loop._can_stop_early:
        return True
    last_epoch = trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch + 1
    return last_epoch and trainer.fit_loop.epoch_loop._num_ready_batches_reached()
