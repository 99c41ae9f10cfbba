"""FSDP2: weights, gradients and optimizer state in shards over ranks, and whole again for generation and export."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard

from rlhf_lightning.models.first_rank import FirstRankBuilds, agree, fill, tensors_of

SHARING: ContextVar[tuple[Any, torch.device] | None] = ContextVar("SHARING", default=None)


def shard(network: nn.Module, mesh: Any, device: torch.device) -> None:
    """Shard each transformer block on its own, and what is left (embeddings, heads) with the root; every rank must call.

    A rank that has built the network without weights (:class:`FirstRankBuilds`) gets its shards from the first.

    Args:
        network: The root whose ``forward`` training calls; its hooks gather what the blocks' do not.
        mesh: One-dimensional device mesh of the ranks that share the weights.
        device: Where this rank's shards live.
    """
    empty = agree(network)
    first = tensors_of(network) if any(empty) and dist.get_rank() == 0 else {}
    for blocks in [m for m in network.modules() if isinstance(m, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    if any(empty):
        fill(network, first, device)


@contextmanager
def sharing(mesh: Any, device: torch.device) -> Iterator[None]:
    """Inside, :func:`placed` shards what is built, of which the first rank alone reads the weights.

    Random numbers go on as if nothing had happened: ranks may have their own by now.
    """
    before = SHARING.set((mesh, device))
    try:
        with torch.random.fork_rng(devices=[]), FirstRankBuilds():
            yield
    finally:
        SHARING.reset(before)


def placed(network: nn.Module, device: torch.device) -> None:
    """Bring a network to where it computes: onto the device, or inside of :func:`sharing` its shards."""
    if (where := SHARING.get()) is None:
        network.to(device)
    else:
        shard(network, *where)


def is_sharded(network: nn.Module) -> bool:
    """Whether any of the weights is in shards."""
    return any(isinstance(m, FSDPModule) for m in network.modules())


@torch.no_grad()
def wake(network: nn.Module, device: torch.device) -> None:
    """Show the root a first forward: FSDP2 wants that before anything below the root is called.

    Args:
        network: Takes input ids, attention mask and response mask.
        device: Where its inputs go.
    """
    if is_sharded(network):
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        network(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([[False, True]], device=device))


@contextmanager
def gathered(*networks: nn.Module) -> Iterator[None]:
    """Keep all weights whole for a while: generation would else gather them at every token, and ranks that decode
    different lengths would wait for each other for ever. Without shards nothing happens.
    """
    shards = [m for network in networks for m in network.modules() if isinstance(m, FSDPModule)]
    for part in shards:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in shards:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def whole_state_dict(network: nn.Module) -> dict[str, Any]:
    """All weights, on the CPU of rank 0; every rank must call.

    Returns:
        The state dict; empty on the other ranks where there are shards.
    """
    return get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
