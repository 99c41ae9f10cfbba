"""A run that goes on with another number of ranks, or with its steps cut into other batches."""

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer

from rlhf_lightning.errors import UserError
from rlhf_lightning.modules.ranks import derived_seed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cut:
    """How the rows of an optimizer step (PPO: of an iteration) are dealt out.

    Attributes:
        batch_size: Rows a batch on one rank; None where no data module says.
        ranks: How many there are.
        accumulate: Batches a step.
    """

    batch_size: int | None
    ranks: int
    accumulate: int

    @classmethod
    def of(cls, trainer: Trainer) -> "Cut":
        """The one of this run."""
        batch_size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
        return cls(batch_size, trainer.world_size, trainer.accumulate_grad_batches)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    def rows(self) -> int:
        """Of a step, over all ranks."""
        return (self.batch_size or 1) * self.ranks * self.accumulate

    def __str__(self) -> str:
        return f"{self.rows()} rows a step (batch_size {self.batch_size} x {self.ranks} ranks x accumulation {self.accumulate})"


def check_same_rows(then: Cut, now: Cut) -> None:
    """The order of the rows goes on only where a step has as many as before.

    Raises:
        UserError: If it has not.
    """
    if then.rows() != now.rows():
        raise UserError(
            f"the checkpoint is of a run with {then}, this one has {now}: the order of the rows can't go on; set "
            f"data.batch_size, trainer.accumulate_grad_batches or trainer.devices so that the product is {then.rows()}"
        )


def count_in_other_batches(loop: dict[str, Any], then: Cut, now: Cut) -> None:
    """Lightning counts batches; where a step has more or fewer of them than before, count anew.

    Args:
        loop: State of the fit loop, at the end of a step; changed in place.
        then: Of the checkpoint.
        now: Of this run.
    """
    if then.accumulate == now.accumulate:
        return
    for part in ("total", "current"):
        counters = loop["epoch_loop.batch_progress"][part]
        for name, batches in counters.items():
            counters[name] = -(-batches // then.accumulate) * now.accumulate


def own_of_other_ranks(states: list[dict[str, Any]], rank: int) -> dict[str, Any]:
    """What a rank is to go on with where there were others: the first with what all of them had counted.

    Args:
        states: Of each rank of then: its random state, and what it has counted by name.
        rank: The rank of now.

    Returns:
        Such a state; without a random state but with a ``seed``, where there was no such rank.
    """
    names = states[0]["means"]
    means = {name: all_counted([state["means"][name] for state in states], rank == 0) for name in names}
    if rank < len(states):
        return {"random": states[rank]["random"], "means": means}
    return {"seed": derived_seed(states[0]["random"]["torch"], rank), "means": means}


def all_counted(states: list[dict[str, Any]], first: bool) -> dict[str, Any]:
    """What all ranks have counted, on the first rank of now; nothing on the others."""
    sums, counts, peaks = (torch.stack([state[name] for state in states]) for name in ("sums", "counts", "peaks"))
    peak = peaks.amax(0)
    return {
        "sums": sums.sum(0) * first,
        "counts": counts.sum(0) * first,
        "peaks": peak if first else torch.full_like(peak, -torch.inf),
        "passed": states[0]["passed"],
    }


def say_that_sampling_differs(then: int, now: int) -> None:
    """One line in the log."""
    log.warning(
        "the checkpoint is of a run on %d ranks, this one has %d: the rows go on in their order, but what is drawn at random "
        "(responses, minibatches) is not what the run would have drawn on %d",
        then,
        now,
        then,
    )
