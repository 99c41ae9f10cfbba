"""Which of a prompt's samples are learnt from, and what each weighs: best-of-n, RAFT and RFT, RSO, reward-weighted regression.

The weights of a prompt's samples sum to one, whatever number of them is kept: no prompt counts more than another.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.best_of_n import acceptance_probabilities, exponential_weights
from rlhf_lightning.losses.checks import require_positive


class SamplingMethod(ABC):
    """Chooses among the scored samples of one prompt."""

    @abstractmethod
    def select(self, scores: Tensor, texts: list[str], generator: torch.Generator) -> dict[int, float]:
        """Which samples to keep.

        Args:
            scores: Of the samples. Shape (n,), float64.
            texts: What they say.
            generator: For methods that draw.

        Returns:
            Numbers of the samples that are kept, best first, and their weights, which sum to one; none may be kept.
        """


def ranked(scores: Tensor) -> list[int]:
    """Numbers of the samples, highest score first; equal scores in the order in which they were drawn."""
    return scores.argsort(descending=True, stable=True).tolist()


def equally(kept: list[int]) -> dict[int, float]:
    """The same weight for each."""
    return {number: 1 / len(kept) for number in kept}


@dataclass(frozen=True)
class BestOfN(SamplingMethod):
    """The sample with the highest score alone. Stiennon et al. 2020 (arXiv 2009.01325), section 4.3."""

    def select(self, scores: Tensor, texts: list[str], generator: torch.Generator) -> dict[int, float]:
        return {ranked(scores)[0]: 1.0}


@dataclass(frozen=True)
class RAFT(SamplingMethod):
    """The best few samples, or all above a score, without repetitions: RAFT (arXiv 2304.06767), RFT (arXiv 2308.01825).

    Attributes:
        keep: Best samples kept of each prompt; None for all.
        least: Score below which nothing is kept: with a reward of 0 and 1, 1 keeps what is right.
        distinct: Keep a text once, however often it was drawn.
    """

    keep: int | None = 1
    least: float | None = None
    distinct: bool = True

    def __post_init__(self) -> None:
        """Refuse a filter that lets nothing through, or everything."""
        if self.keep is not None and self.keep < 1:
            raise UserError(f"keep is at least 1, or null for all, not {self.keep}")
        if self.keep is None and self.least is None:
            raise UserError("RAFT would keep every sample, good or bad: give keep (the best few) or least (a score)")

    def select(self, scores: Tensor, texts: list[str], generator: torch.Generator) -> dict[int, float]:
        kept: list[int] = []
        seen: set[str] = set()
        for number in ranked(scores):
            if len(kept) == self.keep or (self.least is not None and scores[number] < self.least):
                break
            if not (self.distinct and texts[number] in seen):
                kept.append(number)
            seen.add(texts[number])
        return equally(kept) if kept else {}


@dataclass(frozen=True)
class RSO(SamplingMethod):
    """Statistical rejection sampling: :func:`rlhf_lightning.functional.best_of_n.acceptance_probabilities`.

    Attributes:
        beta: Temperature: that of the KL-regularised objective whose optimum is sampled.
        ceiling: The largest reward that there can be; None for the largest of each prompt's samples, which is always kept.
    """

    beta: float = 0.5
    ceiling: float | None = None

    def __post_init__(self) -> None:
        """Refuse a temperature that nothing has."""
        require_positive("beta", self.beta)

    def select(self, scores: Tensor, texts: list[str], generator: torch.Generator) -> dict[int, float]:
        if self.ceiling is not None and scores.max() > self.ceiling:
            raise UserError(f"a reward of {scores.max():g} lies above the ceiling of {self.ceiling:g}; raise ceiling")
        chance = acceptance_probabilities(scores, beta=self.beta, ceiling=self.ceiling)
        accepted = torch.rand(len(scores), generator=generator, dtype=scores.dtype) < chance
        kept = [number for number in ranked(scores) if accepted[number]]
        return equally(kept) if kept else {}


@dataclass(frozen=True)
class RewardWeighted(SamplingMethod):
    """Every sample, weighted: :func:`rlhf_lightning.functional.best_of_n.exponential_weights`.

    Attributes:
        beta: Temperature: that of the KL-regularised objective whose optimum is fitted.
        least: Samples of a smaller weight than this are left out; the others share what they had.
    """

    beta: float = 1.0
    least: float = 1e-6

    def __post_init__(self) -> None:
        """Refuse a temperature that nothing has."""
        require_positive("beta", self.beta)
        if not 0 < self.least < 1:
            raise UserError(f"least is a weight in (0, 1), not {self.least}")

    def select(self, scores: Tensor, texts: list[str], generator: torch.Generator) -> dict[int, float]:
        weights = exponential_weights(scores, beta=self.beta)
        kept = [number for number in ranked(scores) if weights[number] >= min(self.least, float(weights.max()))]
        total = float(weights[kept].sum())
        return {number: float(weights[number]) / total for number in kept}
