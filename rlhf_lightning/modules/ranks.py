"""What each rank has of its own, brought together for a checkpoint and given back."""

from typing import Any

import torch.distributed
from lightning.pytorch import Trainer

from rlhf_lightning.errors import UserError


def over_ranks(trainer: Trainer, value: Any) -> list[Any]:
    """The value of every rank, in their order; every rank must call.

    Args:
        trainer: Of this rank.
        value: Tensors on the CPU and plain data.
    """
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def of_this_rank(trainer: Trainer, values: list[Any]) -> Any:
    """What this rank had.

    Raises:
        UserError: If there were more or fewer ranks then.
    """
    if len(values) != trainer.world_size:
        raise UserError(
            f"the checkpoint is of a run on {len(values)} ranks, this one has {trainer.world_size}: random numbers and the "
            "order of the rows can't go on; set trainer.devices and trainer.num_nodes to what they were"
        )
    return values[trainer.global_rank]
