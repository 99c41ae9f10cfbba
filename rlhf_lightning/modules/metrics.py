"""Means that are right over uneven batches and several ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric

from rlhf_lightning.modules.optimization import gradient_norm


class Means(Metric):
    """Many named means at once, each the sum of what was counted over how much was counted, over every rank.

    One metric rather than one a name, so that ranks exchange one small tensor.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, names: Sequence[str], totals: Sequence[str] = ()) -> None:
        """Args: the names of means and of plain totals, fixed from the start."""
        super().__init__()
        self.names, self.totals = [*names, *totals], set(totals)
        for state in ("sums", "counts"):
            # Persistent: a checkpoint between two logged steps keeps what was counted since the first.
            self.add_state(state, torch.zeros(len(self.names)), dist_reduce_fx="sum", persistent=True)

    def update(self, values: dict[str, tuple[Tensor, Tensor | int]]) -> None:
        """Add sums and counts.

        Args:
            values: For some of the names, the sum over what counts (scalar) and how much that is.
        """
        for name, (total, count) in values.items():
            index = self.names.index(name)
            self.sums[index] += total.detach()
            self.counts[index] += count

    def compute(self) -> dict[str, Tensor]:
        """The means (or totals) of those names of which something was counted."""
        seen = self.counts > 0
        means = self.sums / self.counts
        return {name: self.sums[i] if name in self.totals else means[i] for i, name in enumerate(self.names) if seen[i]}


def log_step(module: Any, optimizer: Optimizer, progress: Sequence[str]) -> None:
    """Every ``log_every_n_steps`` optimizer steps, log the means since the last time; for ``on_before_optimizer_step``.

    Args:
        module: Has ``train_means`` with a total ``num_tokens``, and ``num_tokens``, the running total.
        optimizer: Whose gradients stand.
        progress: Names to show in the progress bar.
    """
    if (module.global_step + 1) % module.trainer.log_every_n_steps:
        return
    values = module.train_means.compute()
    module.train_means.reset()
    module.num_tokens += int(values["num_tokens"])
    values |= {
        "num_tokens": module.num_tokens,
        "learning_rate": optimizer.param_groups[0]["lr"],
        "grad_norm": gradient_norm(module),
        "epoch": module.current_epoch,
    }
    log_training(module, values, progress)


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

    Args:
        module: The one that is evaluated.
        means: What was counted.
        more: Further scalars by name.
    """
    stage = "test" if module.trainer.testing else "eval"
    values = {f"{stage}/{name}": value for name, value in {**means.compute(), **more}.items()}
    means.reset()
    fitting = module.trainer.state.fn == TrainerFn.FITTING
    module.log_dict(values, logger=not fitting)
    if fitting and not module.trainer.sanity_checking:
        # At our own step: Lightning's counts batches, which under manual optimization are not optimizer steps.
        for logger in module.loggers:
            logger.log_metrics({name: float(value) for name, value in values.items()}, step=module.global_step)
