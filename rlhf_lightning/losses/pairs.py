"""What a loss on pairs of responses is given, and what it must say of itself, for ``DPOModule``."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Flag, auto
from functools import cached_property

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.logprobs import sequence_logprobs
from rlhf_lightning.functional.pair_tokens import mean_logprobs
from rlhf_lightning.losses.checks import require_positive

Halves = tuple[Tensor, Tensor]
Counted = dict[str, tuple[Tensor, Tensor | int]]


class Needs(Flag):
    """What a loss has to be given beside the policy's log-probabilities, and what it costs."""

    NOTHING = 0
    REFERENCE = auto()  # the reference's log-probability of each response: a second network, or a pass over the rows
    REFERENCE_TOKENS = auto()  # the same of each token, which is not kept on disk
    COLLISIONS = auto()  # log sum of p^2 of each token's distribution: one more look at the logits
    WHOLE_STEP = auto()  # all pairs of an optimizer step at once: no accumulation


@dataclass(frozen=True)
class ScoredResponses:
    """Scored responses, one a row.

    Attributes:
        logprobs: Of the policy, per token; anything off the mask. Shape (rows, length), nats.
        mask: True on response tokens, EOS included. Same shape, bool.
        ref_logprobs: Of the reference, per token; None where it is not known. Same shape.
        ref_sums: Of the reference, summed over each response, where that alone was kept. Shape (rows,).
        collisions: Log sum of squared probabilities per token; None where nobody asked for it. Shape (rows, length).
    """

    logprobs: Tensor
    mask: Tensor
    ref_logprobs: Tensor | None = None
    ref_sums: Tensor | None = None
    collisions: Tensor | None = None

    @cached_property
    def lengths(self) -> Tensor:
        """Number of tokens. Shape (rows,)."""
        return self.mask.sum(1)

    @cached_property
    def logps(self) -> Tensor:
        """Log-probability under the policy. Shape (rows,)."""
        return sequence_logprobs(self.logprobs, self.mask)

    @cached_property
    def means(self) -> Tensor:
        """Mean log-probability of a token under the policy. Shape (rows,)."""
        return mean_logprobs(self.logprobs, self.mask)

    @cached_property
    def ref_logps(self) -> Tensor:
        """Log-probability under the reference. Shape (rows,).

        Raises:
            UserError: If there is none.
        """
        if self.ref_sums is not None:
            return self.ref_sums
        return sequence_logprobs(given(self.ref_logprobs, "the reference's log-probabilities"), self.mask)

    @cached_property
    def logratios(self) -> Tensor:
        """Log policy - log reference. Shape (rows,)."""
        return self.logps - self.ref_logps

    def rows(self, index: Tensor) -> "ScoredResponses":
        """Some of the rows, in the order of ``index``."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return replace(self, **{name: value[index] for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class Pairs:
    """Pairs of responses to one prompt each. What is of both is a tuple: of the chosen and of the rejected, (pairs,) each.

    Attributes:
        responses: Chosen first: rows 0..B-1 are chosen, rows B..2B-1 their rejected twins.
        gather: Brings together what the ranks have of a value a pair, in the order of the ranks: all of it without gradient,
            and where this rank's begins. None where all pairs of the step are here.
    """

    responses: ScoredResponses
    gather: Callable[[Tensor], tuple[Tensor, int]] | None = None

    def __len__(self) -> int:
        return len(self.responses.mask) // 2

    @property
    def logratios(self) -> Halves:
        return halves(self.responses.logratios)

    @property
    def logps(self) -> Halves:
        return halves(self.responses.logps)

    @property
    def ref_logps(self) -> Halves:
        return halves(self.responses.ref_logps)

    @property
    def means(self) -> Halves:
        return halves(self.responses.means)

    @property
    def lengths(self) -> Halves:
        return halves(self.responses.lengths)

    @property
    def shorter(self) -> Tensor:
        """Of each response, the length of the shorter one of its pair. Shape (2 * pairs,)."""
        return torch.minimum(*self.lengths).repeat(2)

    def swapped(self) -> "Pairs":
        """The same with the other label each."""
        rows = torch.arange(2 * len(self), device=self.responses.mask.device)
        return self.rows(rows.roll(len(self)))

    def rows(self, index: Tensor) -> "Pairs":
        """Other pairs of the same responses: rows of the chosen, then of the rejected. ``index``: shape (2 * pairs,)."""
        return replace(self, responses=self.responses.rows(index))


class PairLoss(ABC):
    """A loss on a chosen and a rejected response, with the reward that it implies."""

    @abstractmethod
    def pairs(self, pairs: Pairs) -> Tensor:
        """Loss of each pair, shape (pairs,)."""

    @property
    @abstractmethod
    def reward_scale(self) -> float:
        """What a log-ratio (or what stands for it) is multiplied by to be called an implicit reward."""

    @property
    def needs(self) -> Needs:
        """What it is to be given."""
        return Needs.REFERENCE

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with a reference; none is loaded otherwise."""
        return bool(self.needs & (Needs.REFERENCE | Needs.REFERENCE_TOKENS))

    def rewards(self, responses: ScoredResponses) -> Tensor:
        """Implicit reward of each response, shape (rows,)."""
        return self.reward_scale * responses.logratios

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what :meth:`counted` adds to the metrics that every pair loss has."""
        return ()

    def counted(self, pairs: Pairs) -> Counted:
        """Sums and counts of those."""
        return {}


@dataclass(frozen=True)
class BetaLoss(PairLoss):
    """A pair loss whose implicit reward is beta times the log-ratio.

    Attributes:
        beta: How strongly the policy is held to the reference: implicit reward a nat of log-ratio. Positive.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        """Refuse coefficients for which the loss means nothing."""
        require_positive("beta", self.beta)

    @property
    def reward_scale(self) -> float:
        return self.beta


def halves(values: Tensor) -> Halves:
    """Of the chosen and of the rejected."""
    chosen, rejected = values.chunk(2)
    return chosen, rejected


def given(values: Tensor | None, what: str) -> Tensor:
    """The values.

    Raises:
        UserError: If there are none: the loss does not say what it needs, or whoever calls it did not listen.
    """
    if values is None:
        raise UserError(f"the loss reads {what}, which were not computed; its `needs` must name them")
    return values
