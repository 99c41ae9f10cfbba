"""A run's folder: one run each, never overwritten unasked, never left behind by a run that did not begin."""

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from rlhf_lightning.callbacks.checkpoint_file import remove_leftovers
from rlhf_lightning.errors import UserError

CONFIG = "config.yaml"
OBJECTS = ("logger", "callbacks", "plugins", "profiler")  # of the Trainer


class RunFolder:
    """The folder of one ``fit``."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.existed = self.path.exists()

    def claim(self, *, resuming: bool, overwrite: bool) -> None:
        """Make sure that the folder is free, or meant to be gone on with.

        Raises:
            UserError: If it holds another run and nobody said what to do with that.
        """
        if not first_process() or not self.path.exists():
            return
        if self.path.is_file():
            raise UserError(f"{self.path} is a file; give another folder with --trainer.default_root_dir")
        if overwrite and not resuming:
            self._clear()
        elif (self.path / CONFIG).exists() and not resuming:
            raise UserError(
                f"{self.path} holds another run; go on with it (--ckpt_path last), replace it (--overwrite true), or give "
                "another folder (--trainer.default_root_dir)"
            )

    def clear_up(self) -> None:
        """Delete what a killed run was writing when it was killed: files and folders that never got their names."""
        if first_process():
            remove_leftovers(self.path)
            remove_leftovers(self.path / "checkpoints")
            for folder in self.path.glob(".export*"):
                shutil.rmtree(folder)

    def abandon(self) -> None:
        """Remove what a run left that never began to train, if the folder is its own."""
        if not self.existed and not (self.path / CONFIG).exists():
            shutil.rmtree(self.path, ignore_errors=True)

    def _clear(self) -> None:
        if any(self.path.iterdir()) and not (self.path / CONFIG).exists():
            raise UserError(f"{self.path} is not empty and holds no run; it is not overwritten, give another folder")
        shutil.rmtree(self.path)


def first_process() -> bool:
    """Whether this is the first process of all hosts, as torchrun, Slurm or Lightning tell before the ranks have met."""
    environment = os.environ
    if "RANK" not in environment and "LOCAL_RANK" in environment:
        return int(environment["LOCAL_RANK"]) == 0 and int(environment.get("NODE_RANK", 0)) == 0
    rank = environment.get("RANK", environment.get("SLURM_PROCID", environment.get("NODE_RANK", 0)))
    return int(rank) == 0


class SaveRunConfig(SaveConfigCallback):
    """Writes config.yaml when training really begins, and tells the loggers.

    Lightning's own does so before the data are looked at: a mistyped path would leave a folder that blocks the next try.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir, self.config_filename)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, str(path), skip_none=False, overwrite=True, multifile=False)
        config: dict[str, Any] = self.config.as_dict()
        told: dict[str, Any] = {key: config[key] for key in ("model", "data", "seed_everything") if key in config}
        told["trainer"] = trainer_settings(config["trainer"], trainer)
        for logger in trainer.loggers:
            logger.log_hyperparams(told)


def trainer_settings(config: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
    """The Trainer's settings for a logger, with what ``auto`` has become; objects, which may hold keys, are left out.

    Args:
        config: Of the Trainer.
        trainer: In training.
    """
    chosen = {
        "accelerator": type(trainer.accelerator).__name__.removesuffix("Accelerator").lower(),
        "strategy": type(trainer.strategy).__name__,
        "devices": trainer.num_devices,
        "num_nodes": trainer.num_nodes,
        "precision": trainer.precision,
        "max_epochs": trainer.max_epochs,
    }
    return {key: value for key, value in config.items() if key not in OBJECTS} | chosen


class ForgetFailedStart(Callback):
    """Clears up after a run that a user's mistake stopped before its first step."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, UserError) and trainer.is_global_zero and trainer.global_step == 0:
            for logger in trainer.loggers:
                logger.finalize("failed")
            self.folder.abandon()
