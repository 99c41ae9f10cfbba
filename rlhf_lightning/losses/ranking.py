"""Losses on the scores of responses, for ``RewardModelModule``."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from rlhf_lightning.functional.listwise import plackett_luce_loss
from rlhf_lightning.functional.ranking import bradley_terry_loss, centering_loss
from rlhf_lightning.losses.checks import require_not_negative


class RankingLoss(ABC):
    """A loss on the scores of a better and a worse response: those of a pair, or any two of a ranking."""

    @abstractmethod
    def pairs(self, chosen: Tensor, rejected: Tensor, margin: Tensor, probability: Tensor | None = None) -> Tensor:
        """Loss of each pair, shape (pairs,); arguments as in :mod:`rlhf_lightning.functional.ranking`."""


class ListLoss(ABC):
    """A loss on the scores of all responses of a ranking at once."""

    @abstractmethod
    def lists(self, scores: Tensor, ranks: Tensor, prompt: Tensor, prompts: int) -> Tensor:
        """Loss of each prompt, shape (prompts,); arguments as in :mod:`rlhf_lightning.functional.listwise`."""


class LabelledLoss(ABC):
    """A loss on the scores of single responses that were labelled right or wrong."""

    @abstractmethod
    def outcomes(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Loss of each response, shape (responses,). Scores and labels, 1 for right and 0 for wrong, of the same shape."""


@dataclass(frozen=True)
class BradleyTerryLoss(RankingLoss):
    """Bradley-Terry with the data's margins times ``margin_scale``, plus ``centering_coef`` times the centring term.

    Attributes:
        centering_coef: Weight of the term that holds the mean score of a pair at 0. At least 0.
        margin_scale: Factor of the data's margins. At least 0.
    """

    centering_coef: float = 0.01
    margin_scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse coefficients for which the loss means nothing."""
        require_not_negative(centering_coef=self.centering_coef, margin_scale=self.margin_scale)

    def pairs(self, chosen: Tensor, rejected: Tensor, margin: Tensor, probability: Tensor | None = None) -> Tensor:
        loss = bradley_terry_loss(chosen, rejected, margin=self.margin_scale * margin, probability=probability)
        return loss + self.centering_coef * centering_loss(chosen, rejected)


@dataclass(frozen=True)
class PlackettLuceLoss(ListLoss):
    """The likelihood of the whole ranking: :func:`rlhf_lightning.functional.listwise.plackett_luce_loss`."""

    def lists(self, scores: Tensor, ranks: Tensor, prompt: Tensor, prompts: int) -> Tensor:
        return plackett_luce_loss(scores, ranks, prompt, prompts=prompts)


@dataclass(frozen=True)
class OutcomeLoss(LabelledLoss):
    """Binary cross-entropy of single responses that were labelled right or wrong: the loss of an outcome verifier.

    Bradley-Terry against an answer that scores 0, so that a sigmoid of the raw score is the probability of being right.
    Source: Cobbe et al. 2021, section 4.2, https://arxiv.org/abs/2110.14168
    """

    def outcomes(self, scores: Tensor, labels: Tensor) -> Tensor:
        return bradley_terry_loss(scores, scores.new_zeros(()), probability=labels.float())
