"""Makes a checkpoint the whole state of a run, so that a run that goes on from it is the one that never stopped."""

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.callbacks.checkpoint_file import class_path
from rlhf_lightning.callbacks.metrics_file import RunMetrics
from rlhf_lightning.callbacks.other_ranks import (
    Cut,
    check_same_rows,
    count_in_other_batches,
    own_of_other_ranks,
    say_that_sampling_differs,
)
from rlhf_lightning.callbacks.random_state import random_state, seed_all, set_random_state
from rlhf_lightning.modules.metrics import Means
from rlhf_lightning.modules.ranks import over_ranks

log = logging.getLogger(__name__)


class RunState(Callback):
    """Adds to Lightning's checkpoints what they lack: the random generators and what was counted since the last log, both
    of every rank, how the rows are dealt out to them, and how many rows metrics.csv had.

    Weights, optimizers, schedules, loop counters and the module's own state are in there already. The loader needs no state:
    where it begins is read off the loop counters (:func:`rlhf_lightning.data.loaders.whereabouts`).
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        own = self._before_validation or own_state(pl_module)  # a validation that is broken off is begun again
        checkpoint["run"] = {
            "module": class_path(pl_module),
            "ranks": over_ranks(trainer, own),
            "cut": Cut.of(trainer).state(),
            "metrics_rows": sum(logger.sync() for logger in metrics_files(trainer)),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        if "run" not in checkpoint:
            log.warning("the checkpoint lacks the state of a run: random numbers and what is counted begin anew")
            return
        self._go_on(trainer, checkpoint)
        for logger in metrics_files(trainer):
            logger.cut(checkpoint["run"]["metrics_rows"])

    def _go_on(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Where the run was, or where it would be had it been on these ranks."""
        states, now = checkpoint["run"]["ranks"], Cut.of(trainer)
        # A checkpoint of before this was known is of the same cut, but for the ranks.
        then = Cut(**checkpoint["run"].get("cut", now.state() | {"ranks": len(states)}))
        check_same_rows(then, now)
        count_in_other_batches(checkpoint["loops"]["fit_loop"], then, now)
        self._loaded = states[trainer.global_rank] if now.ranks == then.ranks else None
        if self._loaded is None:
            self._loaded = own_of_other_ranks(states, trainer.global_rank)
            if trainer.is_global_zero:
                say_that_sampling_differs(then.ranks, now.ranks)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._restore(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._restore(pl_module)
            self._before_validation = own_state(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before_validation = None

    def _restore(self, pl_module: LightningModule) -> None:
        """Only now: what happened since the start, a validation before training for one, must leave no trace."""
        if self._loaded is None:
            return
        for name, means in means_of(pl_module).items():
            means.load_own_state(self._loaded["means"][name])
        if "seed" in self._loaded:
            seed_all(self._loaded["seed"])
        else:
            set_random_state(self._loaded["random"], pl_module.device)
        self._loaded = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loaded is not None and trainer.is_global_zero:
            log.info(
                "the run had come to its end before, at optimizer step %d; with a larger model.iterations, trainer.max_steps "
                "or trainer.max_epochs it resumes",
                trainer.global_step,
            )


def own_state(module: LightningModule) -> dict[str, Any]:
    """What a rank has of its own."""
    return {
        "random": random_state(module.device),
        "means": {name: means.own_state() for name, means in means_of(module).items()},
    }


def means_of(module: LightningModule) -> dict[str, Means]:
    """What a module counts in, by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, Means)}


def metrics_files(trainer: Trainer) -> list[RunMetrics]:
    """The run's metrics.csv, or nothing where it has none."""
    return [logger for logger in trainer.loggers if isinstance(logger, RunMetrics)]
