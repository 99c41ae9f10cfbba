"""What holds a policy to its reference in ``FDPOLoss``: :mod:`rlhf_lightning.functional.divergences`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.divergences import alpha_score, forward_kl_score, jensen_shannon_score


class Divergence(ABC):
    """An f-divergence of the policy from its reference."""

    @abstractmethod
    def score(self, logratio: Tensor) -> Tensor:
        """f' at the ratio, but for a constant; shape of the argument."""


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(reference || policy): wherever the reference goes, the policy must too."""

    def score(self, logratio: Tensor) -> Tensor:
        return forward_kl_score(logratio)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """The mean of both KLs to the mixture."""

    def score(self, logratio: Tensor) -> Tensor:
        return jensen_shannon_score(logratio)


@dataclass(frozen=True)
class AlphaDivergence(Divergence):
    """Between the forward KL (0) and the reverse KL (1), which is DPO's.

    Attributes:
        alpha: Position between the two, in (0, 1).
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        """Refuse coefficients for which the divergence means nothing."""
        if not 0 < self.alpha < 1:
            raise UserError(f"alpha is in (0, 1), not {self.alpha}; 0 is ForwardKL, 1 is DPOLoss")

    def score(self, logratio: Tensor) -> Tensor:
        return alpha_score(logratio, alpha=self.alpha)
