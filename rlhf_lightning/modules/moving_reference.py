"""A reference that follows the policy: TR-DPO."""

from dataclasses import dataclass

import torch
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.precision import HALF, weight_dtypes
from rlhf_lightning.models.spec import ModelSpec


@dataclass(frozen=True)
class MovingReference:
    r"""Every so many optimizer steps, :math:`\theta_{ref} \leftarrow \alpha \theta + (1 - \alpha) \theta_{ref}`.

    The pull is then to where the policy was a while ago, so that it goes further at the same beta, and reference
    log-probabilities hold only until the next move: they can't be kept on disk.

    Attributes:
        every: Optimizer steps between two moves.
        alpha: Share of the policy in the new reference, in (0, 1]; 1 puts it in the reference's place.

    Source: Gorbatovski et al. 2024, https://arxiv.org/abs/2404.09656 (there alpha 0.6, or 1 every 512 steps).
    """

    every: int = 512
    alpha: float = 0.6

    def __post_init__(self) -> None:
        """Refuse what moves nothing, or too far."""
        if self.every < 1 or not 0 < self.alpha <= 1:
            raise UserError(
                f"moving_reference: every is at least 1 and alpha in (0, 1], not {self.every}, {self.alpha}"
            )

    def check(self, policy: ModelSpec, precompute_reference: bool) -> None:
        """Hold it against the rest of the configuration.

        Raises:
            UserError: If the reference has no weights of its own that could move, or would be read from disk.
        """
        if precompute_reference:
            raise UserError(
                "a moving reference has other log-probabilities after each move; leave out moving_reference or set "
                "precompute_reference to false"
            )
        if policy.adapter is not None:
            raise UserError(
                "a moving reference needs weights of its own, and with an adapter it is the policy's base; leave out "
                "moving_reference or policy.adapter"
            )

    def check_networks(self, policy: nn.Module, reference: nn.Module, strategy: Strategy | None) -> None:
        """Hold it against what was built.

        Raises:
            UserError: If the weights of the two don't correspond, FSDP1 is to lay them out, or a mix would be rounded away.
        """
        if isinstance(strategy, FSDPStrategy):
            raise UserError(
                "FSDP1 hides which weights correspond; for moving_reference use -c configs/strategy/fsdp2.yaml"
            )
        precision = "32-true" if strategy is None else str(strategy.precision_plugin.precision)
        if self.alpha < 1 and (precision.endswith("16-true") or weight_dtypes(reference) & set(HALF)):
            raise UserError(
                "a moving reference in half precision stays behind, for small moves are lost in its rounding: set "
                "moving_reference.alpha to 1, or use trainer.precision bf16-mixed with dtype float32"
            )
        ours, theirs = (
            {name: weight.shape for name, weight in network.named_parameters()} for network in (policy, reference)
        )
        if ours != theirs:
            raise UserError(
                "moving_reference mixes weights one by one; policy and reference must be of one architecture"
            )

    @torch.no_grad()
    def move(self, policy: nn.Module, reference: nn.Module, step: int) -> None:
        """After optimizer step number ``step``, from 1: if it is time, mix the weights, shard by shard where there are some."""
        if step % self.every:
            return
        for network in (policy, reference):
            put_down(network)
        for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
            own(old).lerp_(own(new).to(old.dtype), self.alpha)


def put_down(network: nn.Module) -> None:
    """Let go of what FSDP2 gathered: a root keeps it after a forward without a backward, and would not notice the change."""
    for part in network.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def own(weight: torch.Tensor) -> torch.Tensor:
    """The weight, or this rank's shard of it."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
