"""Policy-gradient losses, for ``GRPOModule``."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.aggregation import Aggregation
from rlhf_lightning.functional.kl import kl_k2, kl_k3
from rlhf_lightning.functional.masked import masked_sum
from rlhf_lightning.functional.policy import (
    TokenLoss,
    cispo_loss,
    clipped_policy_loss,
    clipped_sequence_loss,
    reinforce_loss,
)
from rlhf_lightning.losses.checks import require_interface, require_not_negative, require_positive

KLPlacement = Literal["reward_k1", "loss_k2_sequence", "loss_k3_token"]


class PolicyLoss(ABC):
    """A loss of each token from its advantage."""

    @abstractmethod
    def tokens(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
        """Loss of each token; arguments as in :mod:`rlhf_lightning.functional.policy`."""


@dataclass(frozen=True)
class ReinforceLoss(PolicyLoss):
    """No ratio, no bound: :func:`rlhf_lightning.functional.policy.reinforce_loss`."""

    def tokens(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
        return reinforce_loss(logprobs, advantages, mask)


@dataclass(frozen=True)
class ClippedLoss(PolicyLoss):
    """A ratio a token, clipped: :func:`rlhf_lightning.functional.policy.clipped_policy_loss`.

    DAPO's clip-higher is ``clip_high`` .28; two-sided clipping has a ``ratio_cap``.

    Attributes:
        clip_low: The ratio is clipped below 1 minus this, in (0, 1).
        clip_high: The ratio is clipped above 1 plus this. Positive.
        ratio_cap: Bound on the ratio of tokens with a negative advantage, above 1 + clip_high; None for no bound.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_cap: float | None = None

    def __post_init__(self) -> None:
        """Refuse bounds that hold nothing."""
        _check_bounds(self.clip_low, self.clip_high)
        if self.ratio_cap is not None and not self.ratio_cap > 1 + self.clip_high:
            raise UserError(f"ratio_cap must be above 1 + clip_high = {1 + self.clip_high:g}, not {self.ratio_cap}")

    def tokens(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
        bounds = {"clip_low": self.clip_low, "clip_high": self.clip_high, "ratio_cap": self.ratio_cap}
        return clipped_policy_loss(logprobs, old_logprobs, advantages, mask, **bounds)  # type: ignore[arg-type]


@dataclass(frozen=True)
class SequenceClippedLoss(PolicyLoss):
    """A ratio a response, clipped: GSPO, or with ``length_normalised: false`` the RLOO of TRL.

    See :func:`rlhf_lightning.functional.policy.clipped_sequence_loss`.

    Attributes:
        clip_low: The ratio is clipped below 1 minus this, in (0, 1).
        clip_high: The ratio is clipped above 1 plus this. Positive.
        length_normalised: The ratio is the geometric mean over the response's tokens (GSPO), not their product.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    length_normalised: bool = True

    def __post_init__(self) -> None:
        """Refuse bounds that hold nothing."""
        _check_bounds(self.clip_low, self.clip_high)

    def tokens(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
        return clipped_sequence_loss(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            length_normalised=self.length_normalised,
        )


@dataclass(frozen=True)
class CISPOLoss(PolicyLoss):
    """A bounded weight, no clipped gradient: :func:`rlhf_lightning.functional.policy.cispo_loss`.

    Attributes:
        ratio_cap: Bound on the ratio as a token's weight, at least 1.
    """

    ratio_cap: float = 5.0

    def __post_init__(self) -> None:
        """Refuse a bound below which every fresh token lies."""
        if not self.ratio_cap >= 1:
            raise UserError(f"ratio_cap is the greatest ratio itself, at least 1, not {self.ratio_cap}")

    def tokens(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
        return cispo_loss(logprobs, old_logprobs, advantages, mask, ratio_cap=self.ratio_cap)


@dataclass(frozen=True)
class PolicyObjective:
    """What is minimised: a loss of tokens, where the KL to the reference stands, and how tokens are put together.

    Attributes:
        aggregation: What a token weighs; see :func:`rlhf_lightning.functional.aggregation.token_weights`.
        kl_placement: "reward_k1": in the reward, whose gradient is that of KL(policy || reference): ends at the policy
            proportional to reference x exp(reward / coefficient). "loss_k2_sequence": half the squared log-ratio of the
            response, in the loss: the same gradient on fresh responses. "loss_k3_token": GRPO's, in the loss a token at a time:
            the gradient of the *forward* KL, so that it ends elsewhere: reference x coefficient / (lambda - reward).
        loss: Of each token.
        entropy_coef: Weight of an entropy bonus, >= 0.
    """

    aggregation: Aggregation
    kl_placement: KLPlacement
    loss: PolicyLoss = field(default_factory=ClippedLoss)
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        """Refuse coefficients for which the loss means nothing."""
        require_interface("loss", self.loss, PolicyLoss)
        require_not_negative(entropy_coef=self.entropy_coef)

    def kl_tokens(self, log_ratio: Tensor, mask: Tensor) -> Tensor:
        """What the KL adds to the loss of each token for a coefficient of 1; zeros where it stands in the reward.

        A response's k2 is spread over its tokens, so that it is aggregated as the rest of the loss.

        Args:
            log_ratio: log policy - log reference, with gradient. Shape (batch, length), nats.
            mask: True on tokens that count. Same shape, bool.
        """
        if self.kl_placement == "loss_k3_token":
            return kl_k3(log_ratio).masked_fill(~mask, 0)
        if self.kl_placement == "loss_k2_sequence":
            whole = kl_k2(masked_sum(log_ratio, mask, dim=1)) / mask.sum(dim=1).clamp(min=1)
            return whole[:, None].expand(mask.shape).masked_fill(~mask, 0)
        return torch.zeros_like(log_ratio)


def _check_bounds(clip_low: float, clip_high: float) -> None:
    require_positive("clip_high", clip_high)
    if not 0 < clip_low < 1:
        raise UserError(f"clip_low is in (0, 1), not {clip_low}")
