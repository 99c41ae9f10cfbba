"""Losses on a chosen and a rejected response, for ``DPOModule``."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.preference import dpo_loss, ipo_loss
from rlhf_lightning.losses.checks import require_positive


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
        require_positive("beta", self.beta)
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
        require_positive("tau", self.tau)

    def pairs(self, chosen_logratio: Tensor, rejected_logratio: Tensor) -> Tensor:
        return ipo_loss(chosen_logratio, rejected_logratio, tau=self.tau)

    @property
    def reward_scale(self) -> float:
        return self.tau
