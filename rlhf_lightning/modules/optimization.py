"""Learning-rate schedules and gradient norms."""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rlhf_lightning.errors import UserError

OptimizerFactory = Callable[[Iterable], Optimizer]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """What the learning rate is multiplied by: a linear warm-up, then a decay over the rest of the run.

    Attributes:
        warmup: Length of the warm-up, in optimizer steps (methods that sample: iterations).
        decay: Shape of what follows. Where the length of a run is not known in steps or iterations (``trainer.max_time`` or
            ``trainer.max_epochs: -1`` alone), the learning rate stays constant after the warm-up, and a warning says so.
        final: Where the decay ends, as a share of the peak.
    """

    warmup: int = 0
    decay: Literal["constant", "linear", "cosine"] = "linear"
    final: float = 0.0

    def __post_init__(self) -> None:
        """Refuse schedules that no run can follow."""
        if self.warmup < 0 or not 0 <= self.final <= 1:
            raise UserError(f"schedule out of range: {self}; `final` is a share of the peak in [0, 1]")

    def multiplier(self, step: int, total: int | None) -> float:
        """The factor for step ``step`` (from 0) of ``total``; constant after the warm-up where that is None."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if total is None:
            return 1.0
        done = min((step - self.warmup) / max(total - self.warmup, 1), 1.0)
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.decay]
        return self.final + (1 - self.final) * shape if self.decay != "constant" else 1.0

    def attach(self, optimizer: Optimizer, total: int | None) -> "PlannedLR":
        """A scheduler that follows this schedule over ``total`` steps; None where their number is not known."""
        if total is None and self.decay != "constant":
            warn_of_constant_rate(self.decay)
        return PlannedLR(optimizer, lambda step: self.multiplier(step, total))


class PlannedLR(LambdaLR):
    """A schedule whose learning rates are those of the present run, also after a resume.

    Torch's own takes base and last learning rate from the checkpoint: a resumed run that is longer than planned before, or
    has another learning rate, would begin with a step at the old one.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the position from a checkpoint, and the learning rates from the schedule of this run.

        The optimizer's own state, which has the old learning rates, must be loaded before.
        """
        base = self.base_lrs
        super().load_state_dict(state_dict)
        self.base_lrs = base
        rates = [rate * factor(self.last_epoch) for rate, factor in zip(base, self.lr_lambdas, strict=True)]
        for group, initial, rate in zip(self.optimizer.param_groups, base, rates, strict=True):
            group["initial_lr"] = initial
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = rates


@rank_zero_only
def warn_of_constant_rate(decay: str) -> None:
    """Log that a schedule has no length to decay over."""
    log.warning(
        "the length of the run is not known in steps, so the learning rate stays constant after the warm-up (schedule.decay "
        "%s has no effect); give trainer.max_steps, trainer.max_epochs or, for a method that samples, model.iterations",
        decay,
    )


def scheduled(optimizer: Optimizer, schedule: Schedule, trainer: Trainer) -> dict[str, Any]:
    """What ``configure_optimizers`` returns where Lightning steps: a schedule over all optimizer steps of the run."""
    steps = trainer.estimated_stepping_batches
    # Infinite: max_epochs -1 alone. Below 0: a loader of unknown length without max_steps.
    total = int(steps) if 0 <= steps < math.inf else None
    scheduler = schedule.attach(optimizer, total)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """All but the frozen base below an adapter: an optimizer that lists it would have checkpoints speak of it."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def gradient_norm(module: LightningModule) -> Tensor:
    """Euclidean norm of all gradients, before clipping, over all shards of them. Scalar."""
    norm = norm_of([p.grad for p in module.parameters() if p.grad is not None])
    strategy = module.trainer.strategy
    if isinstance(strategy, FSDPStrategy):  # FSDP1: what a rank sees as gradients is its own shard of them
        norm = strategy.reduce(norm.square(), reduce_op="sum").sqrt()
    return norm


def norm_of(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of all of them together; torch takes it only of those that are cut between the same ranks. Scalar."""
    alike: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    norms = [whole(torch.nn.utils.get_total_norm(group)) for group in alike.values()]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm() if norms else torch.zeros(())


def whole(x: Tensor) -> Tensor:
    """A tensor that FSDP2 may have left in shards, gathered."""
    return x.full_tensor() if isinstance(x, DTensor) else x
