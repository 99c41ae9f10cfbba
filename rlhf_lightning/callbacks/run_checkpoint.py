"""When checkpoints are written, and what they say of where the run stands."""

import time
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rlhf_lightning.callbacks.checkpoint_file import LAST, read
from rlhf_lightning.callbacks.run_state import metrics_files
from rlhf_lightning.callbacks.termination import Termination
from rlhf_lightning.errors import RunStopped, UserError
from rlhf_lightning.models.scalar_head import SCALES
from rlhf_lightning.models.sharding import is_sharded


class RunCheckpoint(ModelCheckpoint):
    """Writes ``last.ckpt`` every few minutes or batches, at the end of each epoch, and when the process is asked to end.

    Always between two optimizer steps, never inside of one: gradients that are being accumulated are in no checkpoint. The
    one before is kept as ``previous.ckpt``. With ``monitor``, the best are kept too, under their step; the best of all is
    exported.

    Counted in batches (PPO: iterations), not in optimizer steps as Lightning does: of those an iteration has many.

    A validation at the end of an epoch comes after a checkpoint, so that its failure can't lose the epoch.

    Attributes:
        kept: Path and optimizer step of the newest checkpoint; None before there is one.
    """

    kept: tuple[str, int] | None = None

    def __init__(
        self,
        every_n_batches: int | None = None,
        every_minutes: float | None = 10.0,
        dirpath: str | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        filename: str = "{step}",
    ) -> None:
        """Set the times.

        Args:
            every_n_batches: Batches (PPO: iterations) between two checkpoints; None does not count them.
            every_minutes: Minutes between two checkpoints, whatever comes first; None does not look at the clock.
            dirpath: Folder; None for ``checkpoints`` in the run's folder.
            monitor: Logged name whose best values decide which checkpoints are kept beside the last, and which is exported to
                ``export/``; None keeps none, and exports the last.
            mode: Whether the best is the least or the greatest.
            save_top_k: How many of the best are kept; -1 for every checkpoint, with or without ``monitor``.
            filename: Of those that are kept.
        """
        if (every_n_batches is not None and every_n_batches < 1) or (every_minutes is not None and every_minutes < 0):
            raise UserError(f"checkpoint: {every_n_batches=} is at least 1 and {every_minutes=} at least 0, or null")
        super().__init__(
            dirpath, filename, monitor, mode=mode, save_top_k=save_top_k, save_last=True, enable_version_counter=False
        )
        self.every_n_batches, self.every_minutes = every_n_batches, every_minutes
        self.termination = Termination()
        self._due = self._validation_waits = False
        self._written = time.monotonic()
        self._stepped: int | None = None

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.termination.watch(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.termination.watch(trainer)
        self._written = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        if self.every_n_batches is not None and (loop.total_batch_idx + 1) % self.every_n_batches == 0:
            self._due = True
        if not self._may_save(trainer):
            return
        self._ask_ranks(trainer)
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        self._validation_waits = loop._should_check_val_fx(fetcher)
        if self._validation_waits:
            # It may take longer than we are given, or fail.
            self._save_if(trainer, self._due or self._epoch_ends(trainer), keep_best=False)
        elif not self._epoch_ends(trainer):
            self._save_if(trainer, self._due)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if self._may_save(trainer):
            self._ask_ranks(trainer)
            self._save_if(trainer, self.termination.agreed)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_waits = False
        if self._may_save(trainer) and not self._epoch_ends(trainer):
            self._save_if(trainer, self._due or self.monitor is not None)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_waits = False
        self._ask_ranks(trainer)
        self._save_if(trainer, True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the end of the last epoch, whole or not, has been saved."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        settle(checkpoint["loops"]["fit_loop"], trainer, self._validation_waits)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        loop = checkpoint["loops"]["fit_loop"]
        waits = loop["epoch_loop.val_loop.batch_progress"]["total"]["ready"]
        self._stepped = loop["epoch_loop.state_dict"]["_batches_that_stepped"] + waits
        self.kept = str(trainer.ckpt_path), checkpoint["global_step"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._stepped is not None:  # the x-axis of `self.log`; Lightning's restart may count a step twice
            trainer.fit_loop.epoch_loop._batches_that_stepped, self._stepped = self._stepped, None

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() if self.monitor is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.monitor is not None and state_dict:
            super().load_state_dict(state_dict)

    def _time_is_up(self) -> bool:
        return self.every_minutes is not None and time.monotonic() - self._written >= 60 * self.every_minutes

    def _may_save(self, trainer: Trainer) -> bool:
        """Whether the training stands between two optimizer steps."""
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        return fitting and not trainer.fit_loop.epoch_loop._should_accumulate()

    def _epoch_ends(self, trainer: Trainer) -> bool:
        """Whether no batch follows in this epoch: then its end saves."""
        return trainer.fit_loop.epoch_loop._is_training_done or trainer.should_stop

    def _ask_ranks(self, trainer: Trainer) -> None:
        """Agree on whether to save and whether to end: ranks see the clock and signals at different times."""
        late, ended = self._time_is_up(), self.termination.requested
        if trainer.world_size > 1:
            asked = torch.tensor([float(late), float(ended)], device=trainer.strategy.root_device)
            late, ended = (trainer.strategy.reduce(asked, reduce_op="sum") > 0).tolist()
        self._due = self._due or late or ended
        self.termination.agreed = self.termination.agreed or ended

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """The first rank writes; if it can't, the others must learn of that, or they wait for it."""
        failure: str | None = None
        try:
            super()._save_checkpoint(trainer, filepath)
        except UserError as error:
            failure = str(error)
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the others are
        failure = trainer.strategy.broadcast(failure)
        if failure is not None:
            raise UserError(failure)

    def save_now(self, trainer: Trainer) -> None:
        """Write ``last.ckpt`` now, between two epochs; every rank must call."""
        self._validation_waits = False
        self._ask_ranks(trainer)
        self._save_if(trainer, True, keep_best=False)

    def add_measured(self, trainer: Trainer, module: LightningModule) -> None:
        """Write what a finished run has measured only now into its last checkpoint: the run can't save itself any more.

        Not where weights are in shards: there the checkpoint keeps the scale that it has.
        """
        if self.kept is None or Path(self.kept[0]).name != LAST or is_sharded(module) or not trainer.is_global_zero:
            return
        checkpoint = read(self.kept[0])
        scales = {name: value.cpu() for name, value in module.state_dict().items() if name.split(".")[-1] in SCALES}
        checkpoint["state_dict"] |= scales
        checkpoint["run"]["metrics_rows"] = sum(logger.sync() for logger in metrics_files(trainer))
        module.on_save_checkpoint(checkpoint)
        trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, self.kept[0])

    def _measure_if_best(self, trainer: Trainer, candidates: dict[str, Any]) -> None:
        """Normalise and calibrate a reward model that is about to be kept as one of the best, on its own scores."""
        module: Any = trainer.lightning_module
        if self.monitor is None or not getattr(module, "unmeasured", False):
            return
        if self.check_monitor_top_k(trainer, candidates[self.monitor]):
            module.measure_scores()

    def _save_if(self, trainer: Trainer, wanted: bool, keep_best: bool = True) -> None:
        if not wanted or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        candidates = self._monitor_candidates(trainer)
        if keep_best and (self.save_top_k == -1 or (self.monitor is not None and self.monitor in candidates)):
            self._measure_if_best(trainer, candidates)
            self._save_topk_checkpoint(trainer, candidates)
        self.last_model_path = self.format_checkpoint_name(candidates, LAST.removesuffix(self.FILE_EXTENSION))
        self._save_checkpoint(trainer, self.last_model_path)
        self.kept = self.last_model_path, trainer.global_step
        self._due, self._written = False, time.monotonic()
        if self.termination.agreed:
            raise RunStopped(f"stopped by SIGTERM; where the run stands is in {self.last_model_path}")


def settle(loop: dict[str, Any], trainer: Trainer, validation_waits: bool) -> None:
    """Rewrite the saved counters of Lightning's loops so that they say where the run stands, whatever hook saved them.

    Lightning guesses what to do on a restart from how far one counter is ahead of the next. At the end of an epoch it
    guesses wrong under ``max_steps`` (the epoch ends a second time), and a validation that was due is forgotten. What is
    left is: between two batches of an epoch, with or without a validation to come first, or between two epochs.

    Args:
        loop: State of the fit loop; changed in place.
        trainer: In the hook that saves.
        validation_waits: Whether the last batch calls for a validation that is not done.
    """
    batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    validation = loop["epoch_loop.val_loop.batch_progress"]
    at_epoch_end = epochs["current"]["processed"] == epochs["current"]["ready"]
    # max_steps and max_time end a run, and its last epoch early: with more of them it goes on in the midst of that epoch.
    over = (
        batches["is_last_batch"] or batches["current"]["ready"] >= trainer.num_training_batches
    )  # of a stream, unknown
    epoch_is_over = at_epoch_end and over
    if not at_epoch_end and not validation_waits:  # Lightning counts the step after the hooks
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
    for part in ("total", "current"):
        batches[part] = progress(batches[part]["ready"])
        epochs[part] = progress(epochs[part]["ready"], unfinished=not epoch_is_over)
        validation[part] = progress(int(validation_waits), unfinished=validation_waits)  # Lightning goes back to it
    if epoch_is_over:
        batches["current"], batches["is_last_batch"] = progress(0), False
        optimizer = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        for counters in (loop["epoch_loop.scheduler_progress"], optimizer["step"], optimizer["zero_grad"]):
            counters["current"] = dict.fromkeys(counters["current"], 0)


def progress(begun: int, unfinished: bool = False) -> dict[str, int]:
    """Lightning's four counters where so many were begun, and the last of them is finished or not."""
    ended = begun - unfinished
    return {"ready": begun, "started": begun, "processed": ended, "completed": ended}
