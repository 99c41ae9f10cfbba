"""Losses on single responses with a like or a dislike, for ``KTOModule``."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.unpaired import bco_unpaired_loss, kto_loss
from rlhf_lightning.losses.checks import require_not_negative, require_positive

Baseline = Literal["mismatched", "running_mean", "none"]


class UnpairedLoss(ABC):
    """A loss on the log-ratio of a response that was liked or disliked.

    Attributes:
        baseline: What the log-ratio is compared with. "mismatched": KTO's estimate of the KL by responses to other prompts;
            "running_mean": the mean log-ratio of all responses in the optimizer steps before; "none": zero.
        desirable_weight: Factor of liked responses.
        undesirable_weight: Factor of the others.
    """

    baseline: ClassVar[Baseline] = "none"
    desirable_weight: float
    undesirable_weight: float

    @abstractmethod
    def rows(self, logratio: Tensor, desirable: Tensor, baseline: Tensor) -> Tensor:
        """Loss of each response, shape (rows,); arguments as in :mod:`rlhf_lightning.functional.unpaired`."""

    @property
    @abstractmethod
    def reward_scale(self) -> float:
        """What a log-ratio is multiplied by to be called an implicit reward."""


@dataclass(frozen=True)
class KTOLoss(UnpairedLoss):
    """KTO: :func:`rlhf_lightning.functional.unpaired.kto_loss` with the KL of mismatched pairs as its reference point.

    Attributes:
        beta: Implicit reward a nat of log-ratio. Positive.
    """

    baseline: ClassVar[Baseline] = "mismatched"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuse coefficients for which the loss means nothing."""
        check_coefficients(self.beta, self)

    def rows(self, logratio: Tensor, desirable: Tensor, baseline: Tensor) -> Tensor:
        weights = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
        return kto_loss(logratio, desirable, baseline, beta=self.beta, **weights)

    @property
    def reward_scale(self) -> float:
        return self.beta


@dataclass(frozen=True)
class APOZeroUnpairedLoss(KTOLoss):
    """KTO with a reference point of zero, which no forward of mismatched pairs is needed for."""

    baseline: ClassVar[Baseline] = "none"


@dataclass(frozen=True)
class BCOUnpairedLoss(UnpairedLoss):
    """BCO: :func:`rlhf_lightning.functional.unpaired.bco_unpaired_loss` with the running mean as its shift.

    Attributes:
        beta: Implicit reward a nat of log-ratio. Positive.
    """

    baseline: ClassVar[Baseline] = "running_mean"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuse coefficients for which the loss means nothing."""
        check_coefficients(self.beta, self)

    def rows(self, logratio: Tensor, desirable: Tensor, baseline: Tensor) -> Tensor:
        weights = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
        return bco_unpaired_loss(logratio, desirable, baseline, beta=self.beta, **weights)

    @property
    def reward_scale(self) -> float:
        return self.beta


def check_coefficients(beta: float, loss: UnpairedLoss) -> None:
    """Raises UserError if beta is not positive, a weight is negative, or both are zero."""
    require_positive("beta", beta)
    require_not_negative(desirable_weight=loss.desirable_weight, undesirable_weight=loss.undesirable_weight)
    if not loss.desirable_weight + loss.undesirable_weight:
        raise UserError("desirable_weight and undesirable_weight are both 0: nothing would be learnt")
