"""Losses made of other losses."""

from dataclasses import dataclass
from functools import reduce
from operator import or_

from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.pair_tokens import on_policy_weights
from rlhf_lightning.losses.checks import require_interface, require_not_negative, require_positive
from rlhf_lightning.losses.dpo import DPOLoss
from rlhf_lightning.losses.pairs import Counted, Needs, PairLoss, Pairs, ScoredResponses, given, halves


@dataclass(frozen=True)
class MixedLoss(PairLoss):
    """Several losses at once, each with its weight: RPO is DPO and NLL, MPO is DPO, BCO and NLL.

    The implicit reward is that of the first.

    Attributes:
        losses: The losses; the first gives the implicit reward.
        weights: One for each loss, at least 0; the first is positive.
    """

    losses: list[PairLoss]
    weights: list[float]

    def __post_init__(self) -> None:
        """Refuse weights for which the sum means nothing."""
        if not self.losses or len(self.losses) != len(self.weights):
            raise UserError(f"{len(self.losses)} losses and {len(self.weights)} weights: give a weight for each loss")
        for index, loss in enumerate(self.losses):
            require_interface(f"losses[{index}]", loss, PairLoss)
        require_not_negative(**{f"weights[{i}]": weight for i, weight in enumerate(self.weights)})
        require_positive("the first of the weights, whose loss gives the reward,", self.weights[0])

    @property
    def needs(self) -> Needs:
        return reduce(or_, (loss.needs for loss in self.losses))

    @property
    def reward_scale(self) -> float:
        return self.losses[0].reward_scale

    @property
    def measures(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for loss in self.losses for name in loss.measures))

    def pairs(self, pairs: Pairs) -> Tensor:
        first, *others = (weight * loss.pairs(pairs) for weight, loss in zip(self.weights, self.losses, strict=True))
        return sum(others, first)

    def rewards(self, responses: ScoredResponses) -> Tensor:
        return self.losses[0].rewards(responses)

    def counted(self, pairs: Pairs) -> Counted:
        return {name: value for loss in self.losses for name, value in loss.counted(pairs).items()}


@dataclass(frozen=True)
class WPOLoss(PairLoss):
    """Another loss, of which each pair counts as much as its responses look like the policy's own.

    The weight is :func:`rlhf_lightning.functional.pair_tokens.on_policy_weights` of chosen times rejected. It has no gradient,
    and the loss is divided by the number of pairs, not by the weights.

    Attributes:
        loss: The loss that is weighed.
    """

    loss: PairLoss = DPOLoss()  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        require_interface("loss", self.loss, PairLoss)

    @property
    def needs(self) -> Needs:
        return self.loss.needs | Needs.COLLISIONS

    @property
    def reward_scale(self) -> float:
        return self.loss.reward_scale

    @property
    def measures(self) -> tuple[str, ...]:
        return (*self.loss.measures, "wpo_weight")

    def weights(self, pairs: Pairs) -> Tensor:
        """Of each pair, shape (pairs,)."""
        both = pairs.responses
        collisions = given(both.collisions, "the collision probabilities of tokens")
        chosen, rejected = halves(on_policy_weights(both.logprobs, collisions, both.mask))
        return chosen * rejected

    def pairs(self, pairs: Pairs) -> Tensor:
        return self.weights(pairs) * self.loss.pairs(pairs)

    def rewards(self, responses: ScoredResponses) -> Tensor:
        return self.loss.rewards(responses)

    def counted(self, pairs: Pairs) -> Counted:
        return self.loss.counted(pairs) | {"wpo_weight": (self.weights(pairs).sum(), len(pairs))}
