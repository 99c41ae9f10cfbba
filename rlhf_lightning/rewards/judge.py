"""A judge compares two responses; a win rate makes a score of that, for every method that wants scores."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import groupby, permutations
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import UserError
from rlhf_lightning.losses.checks import require_interface
from rlhf_lightning.rewards.function import find_function
from rlhf_lightning.rewards.reward import Reward, Samples


class Judge(ABC):
    """Says which of two responses to a prompt is better. A user's own subclass is given by its ``class_path``."""

    @property
    def name(self) -> str:
        """What its win rates are logged under."""
        return type(self).__name__

    def prepare(self, device: torch.device | str) -> None:  # noqa: B027  (most judges have nothing to load)
        """Load what is needed, on this device. Called once, before the first verdict."""

    def networks(self) -> list[nn.Module]:
        """Networks that it judges with; as in :meth:`rlhf_lightning.rewards.reward.Reward.networks`."""
        return []

    @abstractmethod
    def prefers_first(self, first: Samples, second: Samples) -> Tensor:
        """Probability that the first response of each pair is the better one; shape (pairs,), in [0, 1]."""


class FunctionJudge(Judge):
    """``f(prompts, first, second) -> list[float]``: for each prompt, how probably the first text is the better one."""

    def __init__(self, function: str | Callable[..., Any]) -> None:
        """Find the function.

        Args:
            function: The function, or its location: ``package.module.name`` or ``path/to/file.py:name``.
        """
        self.function = find_function(function) if isinstance(function, str) else function

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def prefers_first(self, first: Samples, second: Samples) -> Tensor:
        return torch.as_tensor(
            self.function(prompts=first.prompts, first=first.completions, second=second.completions),
            dtype=torch.float32,
        )


class WinRateReward(Reward):
    """How often a judge prefers a response to the others of its group, each pair shown in both orders.

    .. math:: r_i = \\frac{1}{k-1} \\sum_{j \\ne i} \\tfrac12 \\left[ p(1 | i, j) + 1 - p(1 | j, i) \\right]

    A judge that always says "the first" gives everybody one half. Responses that stand side by side and answer one prompt are
    a group; alone in its group (in a validation, say), a response scores one half.

    Source: swapped orders: Lee et al. 2023, section 3.1, https://arxiv.org/abs/2309.00267
    """

    def __init__(self, judge: Judge) -> None:
        """Remember the judge.

        Args:
            judge: Compares two responses to a prompt.
        """
        require_interface("judge", judge, Judge)
        self.judge = judge

    @property
    def name(self) -> str:
        return self.judge.name

    def prepare(self, device: torch.device | str) -> None:
        self.judge.prepare(device)

    def networks(self) -> list[nn.Module]:
        return self.judge.networks()

    def score(self, samples: Samples) -> Tensor:
        asked = [pair for group in groups_of(samples.prompts) for pair in permutations(group, 2)]
        scores, opponents = torch.zeros(2, len(samples.prompts), dtype=torch.float32)
        if asked:
            first, second = (torch.tensor(rows) for rows in zip(*asked, strict=True))
            p = self._verdicts(samples, first.tolist(), second.tolist())
            # Each ordered pair speaks for both of its sides, so that a response is heard in first and in second place.
            scores = scores.index_add(0, first, p).index_add(0, second, 1 - p)
            opponents = opponents.index_add(0, first, torch.ones_like(p)).index_add(0, second, torch.ones_like(p))
        return torch.where(opponents > 0, scores / opponents.clamp(min=1), 0.5)

    def _verdicts(self, samples: Samples, first: list[int], second: list[int]) -> Tensor:
        p = self.judge.prefers_first(samples.rows(first), samples.rows(second)).float().cpu()
        if p.shape != (len(first),) or not bool(((p >= 0) & (p <= 1)).all()):
            raise UserError(
                f"judge {self.name} gave values of shape {tuple(p.shape)} for {len(first)} pairs, "
                f"{p.flatten()[:4].tolist()}, ...; return one probability in [0, 1] a pair"
            )
        return p


def groups_of(prompts: list[Any]) -> list[list[int]]:
    """Numbers of the rows that stand side by side and have the same prompt."""
    return [list(rows) for _, rows in groupby(range(len(prompts)), key=lambda row: prompts[row])]
