"""Weights that are read or drawn by one process and handed to the others, so that a host never holds them once a rank."""

from types import TracebackType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError


class Word(NamedTuple):
    """What a rank tells the others before weights change hands.

    Attributes:
        failure: Why it has no network; None if it has one, or has built all of them.
        parts: Name, shape and dtype of everything in the network.
        attention: Implementation in each of its transformers, which is found out with weights alone.
        empty: Whether it has the network without weights.
    """

    failure: str | None = None
    parts: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    attention: tuple[str, ...] = ()
    empty: bool = False


class OtherRankFailed(UserError):
    """What another rank could not build; raised where the others wait for it."""


class FirstRankBuilds:
    """Inside, the first rank builds networks as ever, and the others build the same ones on the meta device: names and
    shapes, no weights. :func:`rlhf_lightning.models.sharding.shard` then hands the weights on.

    Where the first rank fails, all do, with its message. Afterwards all have its random state: they are where one
    process would be. Without other ranks nothing happens.
    """

    def __init__(self) -> None:
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.meta = torch.device("meta") if self.ranks > 1 and dist.get_rank() > 0 else None

    def __enter__(self) -> None:
        if self.meta is not None:
            self.meta.__enter__()

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        if self.meta is not None:
            self.meta.__exit__(kind, error, where)
        if self.ranks == 1 or isinstance(error, OtherRankFailed):
            return
        exchange(Word(failure=None if error is None else str(error) or type(error).__name__))
        if error is not None:
            return
        state = [torch.get_rng_state()]
        dist.broadcast_object_list(state, src=0)
        torch.set_rng_state(state[0])


def exchange(word: Word) -> list[Word]:
    """The word of every rank.

    Raises:
        OtherRankFailed: If one of the others has failed.
    """
    words = [word] * dist.get_world_size()
    dist.all_gather_object(words, word)
    if word.failure is None and (failed := [other.failure for other in words if other.failure is not None]):
        raise OtherRankFailed(failed[0])
    return words


def agree(network: nn.Module) -> list[bool]:
    """Hear which ranks have the network without weights; all must have the same one, and give it the first's attention.

    Returns:
        One answer a rank.
    """
    tensors = tensors_of(network)
    parts = tuple((name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items())
    models = [module for module in network.modules() if isinstance(module, PreTrainedModel)]
    attention = tuple(str(model.config.get_text_config()._attn_implementation) for model in models)
    words = exchange(Word(None, parts, attention, any(tensor.is_meta for tensor in tensors.values())))
    if len({word.parts for word in words}) > 1:
        raise RuntimeError(f"the ranks have built different networks of class {type(network).__name__}")
    for model, own, first in zip(models, attention, words[0].attention, strict=True):
        if own != first:
            model.set_attn_implementation(first)
    return [word.empty for word in words]


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """All weights and buffers by name, those that no state dict has included, tied ones once."""
    return {name: x.detach() for part in (network.named_parameters(), network.named_buffers()) for name, x in part}


@torch.no_grad()
def fill(network: nn.Module, first: dict[str, Tensor], device: torch.device) -> None:
    """Hand the weights of the first rank to the others, one tensor at a time; every rank must call.

    Args:
        network: In shards; on all ranks but the first, on the meta device.
        first: On the first rank, the whole tensors of before.
        device: Where this rank's shards live.
    """
    if not first:
        network.to_empty(device=device)
    for name, own in tensors_of(network).items():
        whole = first.pop(name) if first else torch.empty(own.shape, dtype=own.dtype, device=device)
        whole = whole.to(device).contiguous()
        dist.broadcast(whole, src=0)
        if isinstance(own, DTensor):
            share = distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)
            own.to_local().copy_(share.to_local())
        else:
            own.copy_(whole)
