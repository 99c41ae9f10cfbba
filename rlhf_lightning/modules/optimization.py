"""Learning-rate schedules and gradient norms."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rlhf_lightning.errors import UserError

OptimizerFactory = Callable[[Iterable], Optimizer]


@dataclass(frozen=True)
class Schedule:
    """What the learning rate is multiplied by: a linear warm-up, then a decay over the rest of the run.

    Attributes:
        warmup: Length of the warm-up, in optimizer steps (PPO: iterations).
        decay: Shape of what follows.
        final: Where the decay ends, as a share of the peak.
    """

    warmup: int = 0
    decay: Literal["constant", "linear", "cosine"] = "linear"
    final: float = 0.0

    def __post_init__(self) -> None:
        """Refuse schedules that no run can follow."""
        if self.warmup < 0 or not 0 <= self.final <= 1:
            raise UserError(f"schedule out of range: {self}; `final` is a share of the peak in [0, 1]")

    def multiplier(self, step: int, total: int) -> float:
        """The factor for step ``step`` (from 0) of ``total``."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = min((step - self.warmup) / max(total - self.warmup, 1), 1.0)
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.decay]
        return self.final + (1 - self.final) * shape if self.decay != "constant" else 1.0

    def attach(self, optimizer: Optimizer, total: int) -> LambdaLR:
        """A scheduler that follows this schedule over ``total`` steps."""
        return LambdaLR(optimizer, lambda step: self.multiplier(step, total))


def scheduled(optimizer: Optimizer, schedule: Schedule, trainer: Trainer) -> dict[str, Any]:
    """What ``configure_optimizers`` returns where Lightning steps: a schedule over all optimizer steps of the run."""
    scheduler = schedule.attach(optimizer, int(trainer.estimated_stepping_batches))
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
