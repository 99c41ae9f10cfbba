"""What YAML names as a loss: a formula of ``functional/`` and its coefficients.

A user's own loss is a subclass in the user's own file, given to the module by its ``class_path``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.masked import masked_sum
from rlhf_lightning.functional.policy import clipped_policy_loss
from rlhf_lightning.functional.preference import dpo_loss, ipo_loss
from rlhf_lightning.functional.ranking import bradley_terry_loss, centering_loss
from rlhf_lightning.functional.value import clipped_value_loss


class PairLoss(ABC):
    """A loss on the log-ratios of a chosen and a rejected response."""

    @abstractmethod
    def pairs(self, chosen_logratio: Tensor, rejected_logratio: Tensor) -> Tensor:
        """Loss of each pair, shape (pairs,); arguments as in :mod:`rlhf_lightning.functional.preference`."""

    @property
    @abstractmethod
    def reward_scale(self) -> float:
        """What a log-ratio is multiplied by to be called an implicit reward."""


@dataclass(frozen=True)
class DPOLoss(PairLoss):
    """DPO, and cDPO with ``label_smoothing``: :func:`rlhf_lightning.functional.preference.dpo_loss`."""

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Refuse coefficients for which the loss means nothing."""
        _require_positive("beta", self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing is a flip probability in [0, 0.5), not {self.label_smoothing}")

    def pairs(self, chosen_logratio: Tensor, rejected_logratio: Tensor) -> Tensor:
        return dpo_loss(chosen_logratio, rejected_logratio, beta=self.beta, label_smoothing=self.label_smoothing)

    @property
    def reward_scale(self) -> float:
        return self.beta


@dataclass(frozen=True)
class IPOLoss(PairLoss):
    """IPO: :func:`rlhf_lightning.functional.preference.ipo_loss`."""

    tau: float = 0.1

    def __post_init__(self) -> None:
        """Refuse coefficients for which the loss means nothing."""
        _require_positive("tau", self.tau)

    def pairs(self, chosen_logratio: Tensor, rejected_logratio: Tensor) -> Tensor:
        return ipo_loss(chosen_logratio, rejected_logratio, tau=self.tau)

    @property
    def reward_scale(self) -> float:
        return self.tau


class RankingLoss(ABC):
    """A loss on the scores of a chosen and a rejected response."""

    @abstractmethod
    def pairs(self, chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
        """Loss of each pair, shape (pairs,); arguments as in :mod:`rlhf_lightning.functional.ranking`."""


@dataclass(frozen=True)
class BradleyTerryLoss(RankingLoss):
    """Bradley-Terry with the data's margins times ``margin_scale``, plus ``centering_coef`` times the centring term."""

    centering_coef: float = 0.01
    margin_scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse coefficients for which the loss means nothing."""
        _require_not_negative(centering_coef=self.centering_coef, margin_scale=self.margin_scale)

    def pairs(self, chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
        loss = bradley_terry_loss(chosen, rejected, margin=self.margin_scale * margin)
        return loss + self.centering_coef * centering_loss(chosen, rejected)


@dataclass(frozen=True)
class PPOLoss:
    """PPO's three terms: clipped surrogate, ``value_coef`` times the value loss, minus ``entropy_coef`` times entropy."""

    clip_range: float = 0.2
    value_clip_range: float = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        """Refuse coefficients for which the loss means nothing."""
        _require_positive("value_clip_range", self.value_clip_range)
        if not 0 < self.clip_range < 1:
            raise UserError(f"clip_range is in (0, 1), not {self.clip_range}")
        _require_not_negative(value_coef=self.value_coef, entropy_coef=self.entropy_coef)

    def policy(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Summed policy loss and the number of clipped tokens, scalars."""
        loss, clipped = clipped_policy_loss(logprobs, old_logprobs, advantages, mask, clip_range=self.clip_range)
        return loss.sum(), clipped.sum()

    def value(self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Summed value loss and the number of clipped tokens, scalars."""
        loss, clipped = clipped_value_loss(values, old_values, returns, mask, clip_range=self.value_clip_range)
        return loss.sum(), clipped.sum()

    def total(self, policy: Tensor, value: Tensor, entropy: Tensor, mask: Tensor) -> Tensor:
        """The three terms together, summed over tokens. ``entropy`` is per token, shape (batch, length)."""
        return policy + self.value_coef * value - self.entropy_coef * masked_sum(entropy, mask)


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{name} must be positive, not {value}")


def _require_not_negative(**coefficients: float) -> None:
    for name, value in coefficients.items():
        if not value >= 0:
            raise UserError(f"{name} must not be negative, not {value}")
