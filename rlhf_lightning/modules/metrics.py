"""Means that are right over uneven batches and several ranks."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from rlhf_lightning.modules.optimization import follow_metric, gradient_norm
from rlhf_lightning.modules.zero import ZeROStrategy

STATES = ("sums", "counts", "peaks")


class Means(Metric):
    """Many named means at once, each the sum of what was counted over how much was counted, over every rank.

    Beside them totals, and the least or greatest of what was given. One metric rather than one a name, so that ranks
    exchange three small tensors.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor
    peaks: Tensor

    def __init__(
        self,
        names: Sequence[str],
        totals: Sequence[str] = (),
        lowest: Sequence[str] = (),
        highest: Sequence[str] = (),
    ) -> None:
        """Args: the names of means and of plain totals, fixed from the start; which of the means are extremes instead."""
        super().__init__()
        self.names, self.totals = [*names, *totals], set(totals)
        self.signs = dict.fromkeys(lowest, -1.0) | dict.fromkeys(highest, 1.0)
        self.passed = dict.fromkeys(totals, 0)
        for state in ("sums", "counts"):
            self.add_state(state, torch.zeros(len(self.names), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("peaks", torch.full((len(self.names),), -torch.inf, dtype=torch.float32), dist_reduce_fx="max")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Follow the module to its device, but not to half precision, in which counts above 256 stand still."""
        return super()._apply(lambda state: state.to(fn(state).device), exclude_state)

    def update(self, values: dict[str, tuple[Tensor, Tensor | int]]) -> None:
        """Add sums and counts.

        Args:
            values: For some of the names, the sum over what counts (scalar) and how much that is.
        """
        for name, (total, count) in values.items():
            index = self.names.index(name)
            self.sums[index] += total.detach()
            self.counts[index] += count
            if name in self.signs:
                self.peaks[index] = torch.maximum(self.peaks[index], self.signs[name] * total.detach())

    def compute(self) -> dict[str, Tensor]:
        """The means (or totals, or extremes) of those names of which something was counted."""
        values = dict(zip(self.names, self.sums / self.counts, strict=True))
        for index, name in enumerate(self.names):
            if name in self.totals:
                values[name] = self.sums[index]
            if name in self.signs:
                values[name] = self.signs[name] * self.peaks[index]
        return {name: value for name, value in values.items() if self.counts[self.names.index(name)] > 0}

    def drain(self) -> dict[str, Any]:
        """The values as they stand; counting begins anew, while totals go on from one call to the next."""
        values: dict[str, Any] = self.compute()
        self.reset()
        for name in self.totals & values.keys():
            self.passed[name] += int(values[name])
            values[name] = self.passed[name]
        return values

    def own_state(self) -> dict[str, Any]:
        """What this rank has counted, for a checkpoint: a state dict would hold that of rank 0 alone."""
        return {name: getattr(self, name).detach().cpu().clone() for name in STATES} | {"passed": dict(self.passed)}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on counting from there."""
        for name in STATES:
            getattr(self, name).copy_(state[name])
        self.passed = dict(state["passed"])


def log_step(module: Any, optimizer: Optimizer, progress: Sequence[str]) -> None:
    """Check the step's gradients, and every ``log_every_n_steps`` steps log the means since the last time.

    The last step of the run is logged too, so that a run shorter than the interval has training metrics. For
    ``on_before_optimizer_step``.

    Args:
        module: Has a ``guard`` and ``train_means``.
        optimizer: Whose gradients stand.
        progress: Names to show in the progress bar.
    """
    strategy = module.trainer.strategy
    norm = strategy.gradient_norm() if isinstance(strategy, ZeROStrategy) else gradient_norm(module)
    module.guard.check(module, norm)
    by_norm = module.trainer.gradient_clip_algorithm != "value"
    module.guard.watch(norm, module.trainer.gradient_clip_val if by_norm else None, module.global_step)
    if (module.global_step + 1) % module.trainer.log_every_n_steps and not is_last_step(module.trainer):
        return
    values = module.train_means.drain()
    values |= {
        "learning_rate": optimizer.param_groups[0]["lr"],
        "grad_norm": norm,
        "epoch": module.current_epoch,
    }
    log_training(module, values, progress)


def is_last_step(trainer: Trainer) -> bool:
    """Whether ``max_steps`` or ``max_epochs`` ends the run after the optimizer step that is about to be made."""
    if 0 < trainer.max_steps <= trainer.global_step + 1:
        return True
    last_epoch = trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch + 1
    return last_epoch and trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def log_training(module: LightningModule, values: dict[str, Tensor | float], progress: Sequence[str]) -> None:
    """Write training metrics to every logger under ``train/``, and a few of them into the progress bar.

    Straight to the loggers, so that the module decides when and at which step; TRL's users know the names.

    Args:
        module: The one in training.
        values: Scalars by TRL's names.
        progress: Names to show in the bar.
    """
    scalars = {name: float(value) for name, value in values.items()}
    for logger in module.loggers:
        logger.log_metrics({f"train/{name}": value for name, value in scalars.items()}, step=module.global_step)
    shown = {name.rsplit("/", 1)[-1]: scalars[name] for name in progress if name in scalars}
    module.log_dict(shown, prog_bar=True, logger=False)


def log_evaluation(module: LightningModule, means: Means, **more: Tensor) -> None:
    """Log what a validation or test counted, under ``eval/`` or ``test/``, and forget it.

    Lightning's check before training is logged, at step 0, where ``trainer.num_sanity_val_steps: -1`` makes it a complete
    validation. Lightning restores the random generators after it. In a resumed run it is not logged.

    Args:
        module: The one that is evaluated.
        means: What was counted.
        more: Further scalars by name.
    """
    stage = "test" if module.trainer.testing else "eval"
    values = {f"{stage}/{name}": value for name, value in {**means.compute(), **more}.items()}
    means.reset()
    fitting = module.trainer.state.fn == TrainerFn.FITTING
    incomplete = module.trainer.num_sanity_val_steps != math.inf or module.trainer.ckpt_path is not None
    incomplete = incomplete and module.trainer.sanity_checking
    module.log_dict(values, logger=not fitting)
    if fitting and not incomplete:
        # At our own step: Lightning's counts batches, which under manual optimization are not optimizer steps.
        for logger in module.loggers:
            logger.log_metrics({name: float(value) for name, value in values.items()}, step=module.global_step)
        if not module.trainer.sanity_checking:
            follow_metric(module, values)
