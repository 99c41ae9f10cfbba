"""Losses on the steps of solutions, for ``ProcessRewardModule``."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from rlhf_lightning.functional.process import step_bce_loss


class StepLoss(ABC):
    """A loss on the score of one step."""

    @abstractmethod
    def steps(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of each step, shape (steps,); arguments as in :mod:`rlhf_lightning.functional.process`."""


@dataclass(frozen=True)
class StepBCELoss(StepLoss):
    """Cross-entropy: :func:`rlhf_lightning.functional.process.step_bce_loss`.

    Attributes:
        harden: Every label above 0 counts as 1: a step is right if any continuation from it was (Wang et al. 2023, eq. 1).
    """

    harden: bool = False

    def steps(self, logits: Tensor, labels: Tensor) -> Tensor:
        return step_bce_loss(logits, (labels > 0).to(labels.dtype) if self.harden else labels)
