"""An ensemble of reward models as one reward, which may trust it less where its members disagree."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.ensembles import disagreement, uncertainty_weighted, worst_case
from rlhf_lightning.losses.checks import require_interface, require_not_negative
from rlhf_lightning.rewards.reward import Reward, Samples
from rlhf_lightning.rewards.reward_model import RewardModelReward


class Combination(ABC):
    """One score from those of the members."""

    @abstractmethod
    def combine(self, scores: Tensor) -> Tensor:
        """Normalised scores of shape (responses, members) to shape (responses,)."""


@dataclass(frozen=True)
class MeanOfMembers(Combination):
    """The mean: less noise, and no caution."""

    def combine(self, scores: Tensor) -> Tensor:
        return scores.mean(dim=-1)


@dataclass(frozen=True)
class WorstCase(Combination):
    """The least favourable member: :func:`rlhf_lightning.functional.ensembles.worst_case`."""

    def combine(self, scores: Tensor) -> Tensor:
        return worst_case(scores)


@dataclass(frozen=True)
class UncertaintyWeighted(Combination):
    """The mean less ``coefficient`` variances: :func:`rlhf_lightning.functional.ensembles.uncertainty_weighted`.

    Attributes:
        coefficient: Weight of the variance. At least 0.
    """

    coefficient: float = 0.5

    def __post_init__(self) -> None:
        """Refuse to be paid for disagreement."""
        require_not_negative(coefficient=self.coefficient)

    def combine(self, scores: Tensor) -> Tensor:
        return uncertainty_weighted(scores, coefficient=self.coefficient)


class Members(RewardModelReward):
    """However many reward models a folder holds."""

    wanted = None

    @property
    def count(self) -> int:
        """How many there are."""
        assert self.model is not None
        return int(self.model.network.temperature.numel())  # type: ignore[operator]


class EnsembleReward(Reward):
    """Scores text with several reward models, each brought to mean 0 and spread 1 by its own normalisation."""

    def __init__(
        self,
        path: str | list[str],
        combination: Combination = UncertaintyWeighted(),
        batch_size: int = 64,
        dtype: str = "float32",
    ) -> None:
        """Remember where the members are; they are loaded when training begins.

        Args:
            path: Folder that a ``RewardModelModule`` run with an ``ensemble`` exported, or those of several runs.
            combination: What becomes of the members' scores.
            batch_size: Responses a forward.
            dtype: Of the weights.
        """
        paths = [path] if isinstance(path, str) else path
        self.readers = [Members(each, batch_size, dtype) for each in paths]
        require_interface("combination", combination, Combination)
        self.combination = combination
        self._disagreement: Tensor | None = None

    @property
    def name(self) -> str:
        return "ensemble"

    def prepare(self, device: torch.device | str) -> None:
        """Load the members.

        Raises:
            UserError: If a folder is missing or no reward model, or there is only one member in all.
        """
        for reader in self.readers:
            reader.prepare(device)
        if len(self.readers) == 1 and self.readers[0].count == 1:
            raise UserError(f"{self.readers[0].path} holds a single reward model: score with RewardModelReward")

    def networks(self) -> list[nn.Module]:
        return [network for reader in self.readers for network in reader.networks()]

    def parts(self) -> dict[str, Tensor]:
        """How far the members' scores were apart: their standard deviation."""
        return {} if self._disagreement is None else {"disagreement": self._disagreement}

    def score(self, samples: Samples) -> Tensor:
        scores = torch.cat([reader.member_scores(samples) for reader in self.readers], dim=-1)
        self._disagreement = disagreement(scores)
        return self.combination.combine(scores)
