"""How many iterations a run of a method that samples has, its schedule, and its end after the last of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import BatchSampler

from rlhf_lightning.data.sampler import BucketBatchSampler
from rlhf_lightning.errors import UserError
from rlhf_lightning.modules.online import prompts_a_batch
from rlhf_lightning.modules.optimization import has_known_length


@dataclass(frozen=True)
class RunPlan:
    """The length of a run.

    Attributes:
        iterations: Iterations from the first on, whatever was done before a resume; None where nothing but a clock or the
            user ends the run.
        steps: Optimizer steps in them, if none is stopped early by ``target_kl``.
        by_epochs: The end of the last epoch ends the run; nothing needs to stop it.
        epochs: Epochs in which they are made, the last perhaps not complete.
    """

    iterations: int | None = None
    steps: int | None = None
    by_epochs: bool = False
    epochs: int | None = None


def check_iterations(iterations: int | None) -> int | None:
    """The key ``iterations`` of a module, checked.

    Raises:
        UserError: If it is less than 1.
    """
    if iterations is not None and iterations < 1:
        raise UserError(
            f"iterations is at least 1, not {iterations}; leave it out where trainer.max_epochs ends the run"
        )
    return iterations


def plan_run(module: Any, steps_of: Callable[[int], int]) -> RunPlan:
    """The smallest number of iterations that ``iterations``, ``max_epochs`` and ``max_steps`` allow.

    ``max_steps`` allows the iterations in which it is reached if none stops early: those that do are not made up for, or
    they would be run at the end of the schedule.

    Args:
        module: In a fit; its ``iterations`` may be None.
        steps_of: Returns the optimizer steps of an iteration, given the number of prompts in its batch.
    """
    trainer = module.trainer
    steps = [steps_of(rows) for rows in prompts_of_batches(module)]
    limits = [module.iterations] if module.iterations is not None else []
    by_epochs = trainer.max_epochs * len(steps) if trainer.max_epochs > 0 and has_known_length(module.trainer) else None
    limits += [by_epochs] if by_epochs is not None else []
    limits += [iterations_within(trainer.max_steps, steps)] if trainer.max_steps > 0 else []
    if not limits:
        return RunPlan()
    count = max(min(limits), 1)
    epochs, rest = divmod(count, len(steps))
    return RunPlan(count, epochs * sum(steps) + sum(steps[:rest]), count == by_epochs, epochs + (rest > 0))


def iterations_within(max_steps: int, steps: list[int]) -> int:
    """Iterations after which ``max_steps`` optimizer steps are reached.

    Args:
        max_steps: At least 1.
        steps: Optimizer steps of each iteration of an epoch.
    """
    epochs, left = divmod(max_steps, sum(steps))
    count = epochs * len(steps)
    for taken in steps:
        if left <= 0:
            break
        left, count = left - taken, count + 1
    return count


def prompts_of_batches(module: Any) -> list[int]:
    """Prompts in each batch of an epoch, the minimum over ranks; of a stream, whose length is not known, in one batch."""
    if not has_known_length(module.trainer):
        return [prompts_a_batch(module)]
    count = int(module.trainer.num_training_batches)
    sampler = getattr(module.trainer.train_dataloader, "batch_sampler", None)
    if isinstance(sampler, BucketBatchSampler):
        return sampler.rows_of_batches()[:count]
    if isinstance(sampler, BatchSampler):  # the user's own loader
        full, rest = divmod(len(sampler.sampler), sampler.batch_size)  # type: ignore[arg-type]
        return [*[sampler.batch_size] * full, *[rest] * (rest > 0)][:count]
    return [prompts_a_batch(module)] * count


def planned_schedule(module: Any, optimizer: Optimizer) -> tuple[list[Optimizer], list[LRScheduler]]:
    """What ``configure_optimizers`` returns where the module steps its schedule itself, with ``advance_schedule``.

    Args:
        module: Has a ``schedule`` and a ``plan``.
        optimizer: The module's.

    Raises:
        UserError: If the schedule can't be made for such a run.
    """
    schedule, plan = module.schedule, module.plan
    interval = schedule.interval or "iteration"
    # An endless stream has no epochs; has_known_length is what the plan was made with.
    epochs = plan.epochs if has_known_length(module.trainer) else None
    total = {"iteration": plan.iterations, "step": plan.steps, "epoch": epochs}[interval]
    scheduler = schedule.attach(optimizer, total, f"{interval}s")
    schedule.check_monitor(scheduler, module.trainer.enable_validation)
    return [optimizer], [scheduler]


def end_after_last(module: Any) -> None:
    """Stop the run if all iterations of its plan are done; before the first one of a resumed run too.

    Epochs and ``max_steps`` end it themselves where they are reached.
    """
    plan, trainer = module.plan, module.trainer
    if plan.iterations is None or module.iteration < plan.iterations or plan.by_epochs:
        return
    if trainer.max_steps < 0 or trainer.global_step < trainer.max_steps:
        trainer.should_stop = True
