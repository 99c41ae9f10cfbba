"""Losses for which no reference is loaded: :mod:`rlhf_lightning.functional.reference_free`.

``nll_loss`` is logged as the mean over the tokens of the chosen responses.
"""

from dataclasses import dataclass

from torch import Tensor

from rlhf_lightning.functional.reference_free import cpo_loss, log_odds, odds_ratio_loss, simpo_loss
from rlhf_lightning.losses.checks import require_flip_probability, require_not_negative
from rlhf_lightning.losses.pairs import BetaLoss, Counted, Needs, PairLoss, Pairs, ScoredResponses


@dataclass(frozen=True)
class NLLLoss(PairLoss):
    """Minus the log-probability of the chosen response, for a :class:`~rlhf_lightning.losses.mixed.MixedLoss`.

    Summed over its tokens as RPO has it, or with ``per_token`` their mean in each response, as in iterative RPO. (TRL's "sft"
    is the mean over all tokens of a micro-batch, which accumulation changes.)

    Attributes:
        per_token: Take the mean over the tokens of each response, not the sum.
    """

    per_token: bool = False

    @property
    def needs(self) -> Needs:
        return Needs.NOTHING

    @property
    def reward_scale(self) -> float:
        return 1.0

    @property
    def measures(self) -> tuple[str, ...]:
        return ("nll_loss",)

    def pairs(self, pairs: Pairs) -> Tensor:
        return -(pairs.means if self.per_token else pairs.logps)[0]

    def rewards(self, responses: ScoredResponses) -> Tensor:
        return responses.means if self.per_token else responses.logps

    def counted(self, pairs: Pairs) -> Counted:
        return {"nll_loss": (-pairs.logps[0].sum(), pairs.lengths[0].sum())}


@dataclass(frozen=True)
class CPOLoss(BetaLoss):
    """Contrastive preference optimisation, with ``nll_coef`` times the chosen response's negative log-probability.

    Attributes:
        nll_coef: Weight of the chosen response's negative log-probability. At least 0.
        label_smoothing: Probability that a label is flipped, in [0, 0.5).
    """

    nll_coef: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Refuse coefficients for which the loss means nothing."""
        super().__post_init__()
        require_not_negative(nll_coef=self.nll_coef)
        require_flip_probability(self.label_smoothing)

    @property
    def needs(self) -> Needs:
        return Needs.NOTHING

    @property
    def measures(self) -> tuple[str, ...]:
        return NLLLoss().measures

    def pairs(self, pairs: Pairs) -> Tensor:
        loss = cpo_loss(*pairs.logps, beta=self.beta, label_smoothing=self.label_smoothing)
        return loss + self.nll_coef * NLLLoss().pairs(pairs)

    def rewards(self, responses: ScoredResponses) -> Tensor:
        return self.reward_scale * responses.logps

    def counted(self, pairs: Pairs) -> Counted:
        return NLLLoss().counted(pairs)


@dataclass(frozen=True)
class SimPOLoss(BetaLoss):
    """SimPO: :func:`rlhf_lightning.functional.reference_free.simpo_loss`; the paper has gamma / beta from .3 to .6.

    Attributes:
        beta: Implicit reward a nat of mean log-probability of a token. Positive.
        gamma: Reward by which the chosen response is to lead. At least 0.
    """

    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        """Refuse coefficients for which the loss means nothing."""
        super().__post_init__()
        require_not_negative(gamma=self.gamma)

    @property
    def needs(self) -> Needs:
        return Needs.NOTHING

    def pairs(self, pairs: Pairs) -> Tensor:
        return simpo_loss(*pairs.means, beta=self.beta, gamma=self.gamma)

    def rewards(self, responses: ScoredResponses) -> Tensor:
        return self.reward_scale * responses.means


@dataclass(frozen=True)
class ORPOLoss(BetaLoss):
    """ORPO: the mean negative log-probability of the chosen response's tokens, and beta times the odds-ratio term.

    Attributes:
        beta: Weight of the odds-ratio term. Positive.
    """

    @property
    def needs(self) -> Needs:
        return Needs.NOTHING

    @property
    def measures(self) -> tuple[str, ...]:
        return (*NLLLoss().measures, "log_odds_ratio", "log_odds_chosen")

    def pairs(self, pairs: Pairs) -> Tensor:
        return NLLLoss(per_token=True).pairs(pairs) + self.beta * odds_ratio_loss(*pairs.means)

    def rewards(self, responses: ScoredResponses) -> Tensor:
        return self.reward_scale * responses.means

    def counted(self, pairs: Pairs) -> Counted:
        """TRL's names: ``log_odds_chosen`` is the lead of the chosen one's log-odds, ``log_odds_ratio`` its log-sigmoid."""
        chosen, rejected = (log_odds(means) for means in pairs.means)
        return NLLLoss().counted(pairs) | {
            "log_odds_ratio": (-odds_ratio_loss(*pairs.means).sum(), len(pairs)),
            "log_odds_chosen": ((chosen - rejected).sum(), len(pairs)),
        }
