"""Losses that hold each response's implicit reward to a level: :mod:`rlhf_lightning.functional.implicit_rewards`."""

from dataclasses import dataclass

from torch import Tensor

from rlhf_lightning.functional.implicit_rewards import (
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    nca_loss,
    sppo_hard_loss,
)
from rlhf_lightning.losses.pairs import BetaLoss, Pairs


@dataclass(frozen=True)
class NCALoss(BetaLoss):
    """Noise-contrastive alignment of pairs: :func:`rlhf_lightning.functional.implicit_rewards.nca_loss`."""

    def pairs(self, pairs: Pairs) -> Tensor:
        return nca_loss(*pairs.logratios, beta=self.beta)


@dataclass(frozen=True)
class BCOPairLoss(BetaLoss):
    """Binary classification of pairs: :func:`rlhf_lightning.functional.implicit_rewards.bco_pair_loss`."""

    def pairs(self, pairs: Pairs) -> Tensor:
        return bco_pair_loss(*pairs.logratios, beta=self.beta)


@dataclass(frozen=True)
class SPPOHardLoss(BetaLoss):
    """SPPO with sure labels: :func:`rlhf_lightning.functional.implicit_rewards.sppo_hard_loss`."""

    def pairs(self, pairs: Pairs) -> Tensor:
        return sppo_hard_loss(*pairs.logratios, beta=self.beta)


@dataclass(frozen=True)
class APOZeroLoss(BetaLoss):
    """APO where the chosen beat the model: :func:`rlhf_lightning.functional.implicit_rewards.apo_zero_loss`."""

    def pairs(self, pairs: Pairs) -> Tensor:
        return apo_zero_loss(*pairs.logratios, beta=self.beta)


@dataclass(frozen=True)
class APODownLoss(BetaLoss):
    """APO where the model beats the chosen: :func:`rlhf_lightning.functional.implicit_rewards.apo_down_loss`."""

    def pairs(self, pairs: Pairs) -> Tensor:
        return apo_down_loss(*pairs.logratios, beta=self.beta)
