"""What each rank has of its own, brought together for a checkpoint and given back, to as many ranks or to others."""

import hashlib
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Trainer
from torch import Tensor


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


def of_this_rank(trainer: Trainer, states: list[Tensor]) -> Tensor:
    """The state that this rank's generator had; where there was no such rank, one drawn from the first's and its number.

    Args:
        trainer: Of this rank.
        states: Of one of torch's CPU generators on every rank of then.
    """
    if trainer.global_rank < len(states):
        return states[trainer.global_rank]
    return torch.Generator().manual_seed(derived_seed(states[0], trainer.global_rank)).get_state()


def derived_seed(state: Tensor, rank: int) -> int:
    """A seed for a rank that had no generator of its own: the same every time, another one for each rank.

    Args:
        state: Of the first rank's generator.
        rank: The rank.
    """
    digest = hashlib.sha256(state.numpy().tobytes() + rank.to_bytes(4, "little")).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
