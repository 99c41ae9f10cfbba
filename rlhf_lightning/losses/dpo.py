"""DPO and the losses that put another curve, or another measure, on how far the chosen response leads."""

from dataclasses import dataclass

from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.pair_tokens import desensitised_logprobs
from rlhf_lightning.functional.preference import (
    aot_loss,
    discopop_loss,
    dpo_loss,
    dpop_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    robust_dpo_loss,
)
from rlhf_lightning.losses.checks import (
    require_flip_probability,
    require_interface,
    require_not_negative,
    require_positive,
)
from rlhf_lightning.losses.divergences import Divergence, ForwardKL
from rlhf_lightning.losses.pairs import BetaLoss, Needs, PairLoss, Pairs, given, halves


@dataclass(frozen=True)
class DPOLoss(BetaLoss):
    """DPO, and cDPO with ``label_smoothing``: :func:`rlhf_lightning.functional.preference.dpo_loss`.

    Attributes:
        label_smoothing: Probability that a label is flipped (cDPO), in [0, 0.5).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Refuse coefficients for which the loss means nothing."""
        super().__post_init__()
        require_flip_probability(self.label_smoothing)

    def pairs(self, pairs: Pairs) -> Tensor:
        return dpo_loss(*pairs.logratios, beta=self.beta, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class RobustDPOLoss(BetaLoss):
    """DPO for labels of which this share is flipped: :func:`rlhf_lightning.functional.preference.robust_dpo_loss`.

    Attributes:
        label_smoothing: Share of the labels that is flipped, in [0, 0.5).
    """

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        """Refuse coefficients for which the loss means nothing."""
        super().__post_init__()
        require_flip_probability(self.label_smoothing)

    def pairs(self, pairs: Pairs) -> Tensor:
        return robust_dpo_loss(*pairs.logratios, beta=self.beta, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class IPOLoss(PairLoss):
    """IPO: :func:`rlhf_lightning.functional.preference.ipo_loss`.

    Attributes:
        tau: Coefficient of the KL; the log-ratio is to lead by 1 / (2 tau). Positive.
    """

    tau: float = 0.1

    def __post_init__(self) -> None:
        """Refuse coefficients for which the loss means nothing."""
        require_positive("tau", self.tau)

    def pairs(self, pairs: Pairs) -> Tensor:
        return ipo_loss(*pairs.logratios, tau=self.tau)

    @property
    def reward_scale(self) -> float:
        return self.tau


@dataclass(frozen=True)
class HingeLoss(BetaLoss):
    """SLiC's hinge on the implicit rewards: :func:`rlhf_lightning.functional.preference.hinge_loss`."""

    def pairs(self, pairs: Pairs) -> Tensor:
        return hinge_loss(*pairs.logratios, beta=self.beta)


@dataclass(frozen=True)
class EXOLoss(BetaLoss):
    """EXO on pairs: :func:`rlhf_lightning.functional.preference.exo_loss`.

    Attributes:
        label_smoothing: Probability that a label is flipped, in (0, 0.5).
    """

    label_smoothing: float = 0.001

    def __post_init__(self) -> None:
        """Refuse coefficients for which the loss means nothing."""
        super().__post_init__()
        require_flip_probability(self.label_smoothing)
        if self.label_smoothing == 0:
            raise UserError("EXO's label_smoothing must be positive: a sure label is infinitely far; 0.001 is usual")

    def pairs(self, pairs: Pairs) -> Tensor:
        return exo_loss(*pairs.logratios, beta=self.beta, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class DiscoPOPLoss(BetaLoss):
    """DiscoPOP: :func:`rlhf_lightning.functional.preference.discopop_loss`.

    Attributes:
        tau: Temperature of the sigmoid that mixes the logistic and the exponential loss. Positive.
    """

    tau: float = 0.05

    def __post_init__(self) -> None:
        """Refuse coefficients for which the loss means nothing."""
        super().__post_init__()
        require_positive("tau", self.tau)

    def pairs(self, pairs: Pairs) -> Tensor:
        return discopop_loss(*pairs.logratios, beta=self.beta, tau=self.tau)


@dataclass(frozen=True)
class DPOPLoss(BetaLoss):
    """DPO that holds the chosen response up: :func:`rlhf_lightning.functional.preference.dpop_loss`.

    Attributes:
        penalty: Weight of what the chosen response has lost against the reference, in nats. At least 0.
    """

    penalty: float = 50.0

    def __post_init__(self) -> None:
        """Refuse coefficients for which the loss means nothing."""
        super().__post_init__()
        require_not_negative(penalty=self.penalty)

    def pairs(self, pairs: Pairs) -> Tensor:
        return dpop_loss(*pairs.logratios, beta=self.beta, penalty=self.penalty)


@dataclass(frozen=True)
class NormalisedDPOLoss(BetaLoss):
    """DPO on log-ratios averaged over the tokens of a response, as Tulu 3 has it; so beta is larger, 5 there.

    Attributes:
        beta: Implicit reward a nat of log-ratio a token. Positive.
    """

    beta: float = 5.0

    def pairs(self, pairs: Pairs) -> Tensor:
        chosen, rejected = halves(pairs.responses.logratios / pairs.responses.lengths)
        return dpo_loss(chosen, rejected, beta=self.beta)


@dataclass(frozen=True)
class LDDPOLoss(BetaLoss):
    """DPO of which the tokens beyond the length of the shorter response count ``alpha``.

    See :func:`rlhf_lightning.functional.pair_tokens.desensitised_logprobs`, of policy and reference. 1 is DPO.

    Attributes:
        alpha: Weight of the tokens beyond the length of the shorter response, in [0, 1]; 1 is DPO.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        """Refuse coefficients for which the loss means nothing."""
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha is a weight of tokens in [0, 1], not {self.alpha}")

    @property
    def needs(self) -> Needs:
        return Needs.REFERENCE_TOKENS

    def pairs(self, pairs: Pairs) -> Tensor:
        both = pairs.responses
        ratios = both.logprobs - given(both.ref_logprobs, "the reference's log-probabilities of tokens")
        chosen, rejected = halves(desensitised_logprobs(ratios, both.mask, pairs.shorter, alpha=self.alpha))
        return dpo_loss(chosen, rejected, beta=self.beta)


@dataclass(frozen=True)
class FDPOLoss(BetaLoss):
    """DPO under another divergence than the reverse KL: :mod:`rlhf_lightning.functional.divergences`.

    Attributes:
        divergence: What holds the policy to the reference: ForwardKL, JensenShannon or AlphaDivergence.
    """

    divergence: Divergence = ForwardKL()  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_interface("divergence", self.divergence, Divergence)

    def pairs(self, pairs: Pairs) -> Tensor:
        chosen, rejected = halves(self.divergence.score(pairs.responses.logratios))
        return dpo_loss(chosen, rejected, beta=self.beta)


@dataclass(frozen=True)
class AOTLoss(BetaLoss):
    """Alignment by optimal transport, over all pairs of a step: :func:`rlhf_lightning.functional.preference.aot_loss`.

    Attributes:
        label_smoothing: Probability that a label is flipped, in [0, 0.5).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Refuse coefficients for which the loss means nothing."""
        super().__post_init__()
        require_flip_probability(self.label_smoothing)

    @property
    def needs(self) -> Needs:
        return Needs.REFERENCE | Needs.WHOLE_STEP

    def pairs(self, pairs: Pairs) -> Tensor:
        logps = *pairs.logps, *pairs.ref_logps
        return aot_loss(*logps, beta=self.beta, label_smoothing=self.label_smoothing, gather=pairs.gather)
