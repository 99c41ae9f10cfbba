"""Losses on the scores of responses, for ``RewardModelModule``."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from rlhf_lightning.functional.ranking import bradley_terry_loss, centering_loss
from rlhf_lightning.losses.checks import require_not_negative


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
        require_not_negative(centering_coef=self.centering_coef, margin_scale=self.margin_scale)

    def pairs(self, chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
        loss = bradley_terry_loss(chosen, rejected, margin=self.margin_scale * margin)
        return loss + self.centering_coef * centering_loss(chosen, rejected)
