"""Learning-rate schedules and gradient norms."""

import logging
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rlhf_lightning.data.streams import StreamSource
from rlhf_lightning.errors import UserError
from rlhf_lightning.modules.schedulers import (
    OURS,
    PlannedLR,
    check_named,
    checked_length,
    follows_metric,
    from_transformers,
    made,
    names,
)

OptimizerFactory = Callable[[Iterable], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
Interval = Literal["step", "epoch", "iteration"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """How the learning rate changes: a linear warm-up and a decay over the rest of the run, or a scheduler of any other kind.

    A checkpoint keeps the state of ``scheduler``: a resumed run has its settings, not those of a changed config. A schedule
    that ``decay`` names follows the config and the length of the resumed run.

    Attributes:
        warmup: Length of the warm-up, in steps of ``interval``.
        decay: Shape of what follows: constant, linear, cosine, or the name of a schedule of transformers, such as
            cosine_with_min_lr, inverse_sqrt or warmup_stable_decay. Where the length of a run is not known
            (``trainer.max_time`` or ``trainer.max_epochs: -1`` alone), linear and cosine stay constant after the warm-up, and a
            warning is logged.
        final: Where linear and cosine end, as a share of the peak.
        options: Arguments of the schedule of transformers, such as ``{min_lr_rate: 0.1}``.
        scheduler: Class from ``torch.optim.lr_scheduler`` (StepLR, OneCycleLR, ...) or the user's own subclass of LRScheduler,
            in place of warmup, decay, final and options.
        interval: When the schedule advances: after each optimizer ``step``, after each ``epoch``, or (methods that sample)
            after each ``iteration``. None for step, and for methods that sample iteration.
        monitor: Logged metric of the validation, such as eval/loss, for schedulers that follow one (ReduceLROnPlateau,
            GreedyLR): they advance after each validation, and ``interval`` has no meaning for them.
    """

    warmup: int = 0
    decay: str = "linear"
    final: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    scheduler: SchedulerFactory | None = None
    interval: Interval | None = None
    monitor: str | None = None

    def __post_init__(self) -> None:
        """Refuse schedules that no run can follow, and settings without an effect."""
        if self.warmup < 0 or not 0 <= self.final <= 1:
            raise UserError(
                f"schedule out of range: warmup {self.warmup}, final {self.final}; warmup is at least 0, and final is a "
                "share of the peak in [0, 1]"
            )
        if self.scheduler is None:
            check_named(self.decay, self.options, self.final)
        elif self.warmup or self.final or self.options or self.decay != "linear":
            raise UserError(
                "schedule.scheduler is the complete schedule: warmup, decay, final and options have no effect beside it; leave "
                f"them out, or name a schedule that has a warm-up with schedule.decay ({', '.join(names())})"
            )

    def multiplier(self, step: int, total: int | None) -> float:
        """The factor for step ``step`` (from 0) of ``total``; constant after the warm-up where that is None."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if total is None:
            return 1.0
        done = min((step - self.warmup) / max(total - self.warmup, 1), 1.0)
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.decay]
        return self.final + (1 - self.final) * shape if self.decay != "constant" else 1.0

    def attach(self, optimizer: Optimizer, total: int | None, unit: str = "steps") -> LRScheduler:
        """A scheduler that follows this schedule over ``total`` steps; None where their number is not known.

        Args:
            optimizer: Its learning rates are the peak.
            total: Steps of the run, in units of ``interval``.
            unit: What they are called in messages.

        Raises:
            UserError: If the schedule can't be made for such a run.
        """
        if self.scheduler is not None:
            return checked_length(made(self.scheduler, optimizer), total, unit)
        if total is not None and 0 < total <= self.warmup:
            warn_of_long_warmup(self.warmup, total, unit)
        if self.decay not in OURS:
            return from_transformers(self.decay, optimizer, self.warmup, total, self.options)
        if total is None and self.decay != "constant":
            warn_of_constant_rate(self.decay)
        return PlannedLR(optimizer, lambda step: self.multiplier(step, total))

    def check_monitor(self, scheduler: LRScheduler, validates: bool) -> None:
        """Make sure that a scheduler that follows a metric has one, and no other.

        Args:
            scheduler: From :meth:`attach`.
            validates: Whether the run has validations.

        Raises:
            UserError: If ``monitor`` is missing or has no effect, or nothing would be monitored.
        """
        name = type(scheduler).__name__
        if not follows_metric(scheduler):
            if self.monitor is not None:
                raise UserError(
                    f"schedule.monitor has no effect: {name} follows no metric, as ReduceLROnPlateau does; leave it out"
                )
            return
        if self.monitor is None:
            raise UserError(f"{name} follows a metric of the validation: name it, such as schedule.monitor: eval/loss")
        if self.interval is not None:
            raise UserError(f"{name} advances after each validation; leave schedule.interval out")
        if not validates:
            raise UserError(f"{name} follows {self.monitor}, and the run has no validation; choose another schedule")


@rank_zero_only
def warn_of_constant_rate(decay: str) -> None:
    """Log that a schedule has no length to decay over."""
    log.warning(
        "the length of the run is not known in steps, so the learning rate stays constant after the warm-up (schedule.decay "
        "%s has no effect); give trainer.max_steps, trainer.max_epochs or, for a method that samples, model.iterations",
        decay,
    )


@rank_zero_only
def warn_of_long_warmup(warmup: int, total: int, unit: str) -> None:
    """Log that the run ends before its learning rate has reached the peak."""
    log.warning(
        "schedule.warmup is %d %s and the run has %d: the learning rate never reaches its peak; shorten the warm-up or train "
        "for longer",
        warmup,
        unit,
        total,
    )


def scheduled(optimizer: Optimizer, schedule: Schedule, trainer: Trainer) -> dict[str, Any]:
    """What ``configure_optimizers`` returns where Lightning steps: a schedule over all steps or epochs of the run.

    Raises:
        UserError: If the schedule can't be made for such a run.
    """
    interval = schedule.interval or "step"
    if interval == "iteration":
        raise UserError(
            "schedule.interval: only methods that sample (PPO, GRPO, online DPO) have iterations; use step or epoch"
        )
    total = steps_of_run(trainer) if interval == "step" else epochs_of_run(trainer)
    scheduler = schedule.attach(optimizer, total, f"{interval}s")
    schedule.check_monitor(scheduler, trainer.enable_validation)
    config: dict[str, Any] = {"scheduler": scheduler, "interval": interval, "reduce_on_plateau": False}
    if follows_metric(scheduler):  # Lightning would step it after the checkpoint at the end of an epoch
        config["frequency"] = sys.maxsize
    return {"optimizer": optimizer, "lr_scheduler": config}


def steps_of_run(trainer: Trainer) -> int | None:
    """Optimizer steps of the run; None where they are not known."""
    steps = trainer.estimated_stepping_batches
    # Infinite: max_epochs -1 alone. Below 0: a loader of unknown length without max_steps.
    return int(steps) if 0 <= steps < math.inf else None


def has_known_length(trainer: Trainer) -> bool:
    """Whether the number of batches of an epoch is known; that of a stream is not."""
    if isinstance(getattr(getattr(trainer, "datamodule", None), "source", None), StreamSource):
        return False  # and its loader is not made here: it has to know first where a resumed run is
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    return trainer.num_training_batches != float("inf")


def epochs_of_run(trainer: Trainer) -> int | None:
    """Epochs of the run, the last of them perhaps not complete; None where they are not known."""
    steps = steps_of_run(trainer)
    if steps is None or not has_known_length(trainer):
        return trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None
    return math.ceil(steps / math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))


def follow_metric(module: LightningModule, values: dict[str, Any]) -> None:
    """After a validation of a fit, advance the schedulers that follow a metric.

    Args:
        module: May have a ``schedule``.
        values: What the validation logged.

    Raises:
        UserError: If the metric was not logged.
    """
    schedule = getattr(module, "schedule", None)
    if not isinstance(schedule, Schedule) or schedule.monitor is None:
        return
    if schedule.monitor not in values:
        raise UserError(
            f"schedule.monitor: {schedule.monitor} was not logged by the validation; logged were {', '.join(sorted(values))}"
        )
    for config in module.trainer.lr_scheduler_configs:
        if follows_metric(config.scheduler):
            step: Callable[[float], None] = config.scheduler.step  # type: ignore[assignment]
            step(float(values[schedule.monitor]))


def advance_schedule(module: Any, happened: Interval) -> None:
    """Advance the schedule if it counts what has just ended: an optimizer step, an iteration, or an epoch.

    Args:
        module: Made its scheduler with :func:`~rlhf_lightning.modules.plan.planned_schedule`.
        happened: What has ended; an epoch that ``max_steps`` or ``iterations`` cut short is not counted.
    """
    if (module.schedule.interval or "iteration") != happened or module.schedule.monitor is not None:
        return
    if happened != "epoch" or module.trainer.fit_loop.epoch_loop._num_ready_batches_reached():
        module.lr_schedulers().step()


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
