"""Learning-rate schedulers by name or class, and the checks that a run can follow them."""

import difflib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from rlhf_lightning.errors import UserError

OURS = ("constant", "linear", "cosine")
GIVEN = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}  # arguments that are no options


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


@cache
def functions() -> dict[str, Callable[..., LRScheduler]]:
    """The schedules of transformers by name, without those of ours, which have the same shapes and other keys."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION  # takes a second, which most runs need not spend

    found: dict[Any, Any] = TYPE_TO_SCHEDULER_FUNCTION
    return {kind.value: function for kind, function in found.items() if kind.value not in OURS}


def names() -> list[str]:
    """All names of schedules."""
    return [*OURS, *functions()]


def check_named(name: str, options: dict[str, Any], final: float) -> None:
    """Make sure that a schedule of this name exists and takes these options.

    Raises:
        UserError: If not; it lists what there is.
    """
    if name in OURS:
        if options:
            raise UserError(
                f"schedule.options belong to the schedules of transformers ({', '.join(functions())}); {name} has the keys "
                "warmup and final"
            )
        return
    if name not in functions():
        near = difflib.get_close_matches(name, names(), 1)
        meant = f"; did you mean {near[0]}?" if near else ";"
        classes = [kind for kind in dir(torch.optim.lr_scheduler) if kind.lower() == name.lower()]
        if classes and name[0].isupper():
            meant = f"; a class is named by schedule.scheduler: {classes[0]};"
        raise UserError(
            f"schedule.decay: {name!r} is not a schedule{meant} there are {', '.join(names())}; any class of "
            "torch.optim.lr_scheduler is named by schedule.scheduler"
        )
    if final:
        raise UserError(f"schedule.final belongs to linear and cosine; {name} has schedule.options: {options_of(name)}")
    known = inspect.signature(functions()[name]).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    for option in options:
        if not takes_any and option not in known.keys() - GIVEN:
            raise UserError(f"schedule.options: {name} has no {option}; it has {options_of(name)}")


def options_of(name: str) -> str:
    """The options of a schedule of transformers, as text."""
    parameters = inspect.signature(functions()[name]).parameters
    return ", ".join(option for option in parameters if option not in GIVEN) or "none"


def from_transformers(
    name: str, optimizer: Optimizer, warmup: int, total: int | None, options: dict[str, Any]
) -> LRScheduler:
    """A schedule of transformers for an optimizer; with groups, each has its own peak.

    Args:
        name: As ``transformers.get_scheduler`` takes it.
        optimizer: Its learning rates are the peak.
        warmup: Steps of the warm-up.
        total: Steps of the run; None where they are not known.
        options: Further arguments.

    Raises:
        UserError: If the schedule needs the length of the run, or refuses an option.
    """
    function = functions()[name]
    known = inspect.signature(function).parameters
    needed = "num_training_steps" in known and known["num_training_steps"].default is inspect.Parameter.empty
    if total is None and (needed or (name == "warmup_stable_decay" and "num_stable_steps" not in options)):
        raise UserError(
            f"schedule.decay {name} needs the length of the run, which is not known: give trainer.max_steps, "
            "trainer.max_epochs or, for a method that samples, model.iterations; or take constant_with_warmup or inverse_sqrt"
        )
    if warmup and "num_warmup_steps" not in known:
        raise UserError(f"schedule.warmup has no effect on {name}; leave it out, or put its own into schedule.options")
    arguments = {"num_warmup_steps": warmup, "num_training_steps": total}
    if "num_stable_steps" in options:
        del arguments["num_training_steps"]
    given = {key: value for key, value in arguments.items() if key in known} | options
    try:
        if "num_warmup_steps" not in known:  # those that follow a metric
            return function(optimizer, **given)
        # The functions read the learning rates of an optimizer, and change them: theirs is a copy.
        twin = torch.optim.SGD(
            [{"params": [torch.zeros(1)], "lr": float(group["lr"])} for group in optimizer.param_groups],
            lr=float(optimizer.defaults.get("lr", optimizer.param_groups[0]["lr"])),
        )
        factors = function(twin, **given).lr_lambdas  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise UserError(f"schedule.decay {name}: {error}; its options are {options_of(name)}") from error
    return PlannedLR(optimizer, [as_function(factor) for factor in factors])


def as_function(factor: Callable[[int], float]) -> Callable[[int], float]:
    """The same as a plain function: the attributes of any other callable would go into checkpoints."""
    return lambda step: factor(step)


def made(factory: Callable[[Optimizer], LRScheduler], optimizer: Optimizer) -> LRScheduler:
    """The scheduler that a class makes of an optimizer.

    Raises:
        UserError: If it refuses its arguments.
    """
    try:
        return factory(optimizer)
    except (TypeError, ValueError) as error:
        raise UserError(f"schedule.scheduler: {str(error).splitlines()[0]}") from error


def checked_length(scheduler: LRScheduler, total: int | None, unit: str) -> LRScheduler:
    """A scheduler that raises after its last step (OneCycleLR), compared with the run.

    Raises:
        UserError: If the run is longer, or endless.
    """
    planned = getattr(scheduler, "total_steps", None)
    if isinstance(planned, int) and (total is None or planned < total):
        run = f"the run has {total} {unit}" if total is not None else "the length of the run is not known"
        raise UserError(
            f"schedule.scheduler: {type(scheduler).__name__} has total_steps {planned}, and {run}; make them equal"
        )
    return scheduler


def follows_metric(scheduler: Any) -> bool:
    """Whether a scheduler's ``step`` needs the value of a metric."""
    parameter = inspect.signature(scheduler.step).parameters.get("metrics")
    return parameter is not None and parameter.default is inspect.Parameter.empty
