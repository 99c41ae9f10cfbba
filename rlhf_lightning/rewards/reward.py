"""What a reward is given, what it gives back, and the check on what came."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import UserError


@dataclass(frozen=True)
class Samples:
    """Responses to be scored, all lists of one length.

    Attributes:
        prompts: As the dataset gave them: text, or a list of messages.
        completions: Text of the responses, without special tokens.
        completion_ids: Token ids of the responses under the policy's tokenizer, EOS included.
        truncated: True where the response was cut off before EOS.
        columns: Every other column of the dataset.
    """

    prompts: list[Any]
    completions: list[str]
    completion_ids: list[list[int]]
    truncated: list[bool]
    columns: dict[str, list[Any]] = field(default_factory=dict)


class Reward(ABC):
    """Scores responses. A user's own subclass is given by its ``class_path``."""

    @property
    def name(self) -> str:
        """What its scores are logged under."""
        return type(self).__name__

    def prepare(self, device: torch.device | str) -> None:  # noqa: B027  (most rewards have nothing to load)
        """Load what is needed, on this device. Called once, before the first score."""

    def networks(self) -> list[nn.Module]:
        """Networks that it scores with, which may be in shards: whoever calls ``score`` gathers them first."""
        return []

    def parts(self) -> dict[str, Tensor]:
        """What the last scores were made of, by name, shape (samples,) each; nothing for a single reward."""
        return {}

    @abstractmethod
    def score(self, samples: Samples) -> Tensor:
        """Score each sample; shape (len(samples.prompts),), float32, higher is better."""


def checked_scores(reward: Reward, samples: Samples) -> Tensor:
    """``reward.score`` held against what was asked for.

    Raises:
        UserError: If the number of scores is wrong or one is not a finite number; names the reward and the sample.
    """
    scores = torch.as_tensor(reward.score(samples), dtype=torch.float32)
    expected = len(samples.prompts)
    if scores.shape != (expected,):
        raise UserError(
            f"{reward.name} returned scores of shape {tuple(scores.shape)} for {expected} samples; one each is due"
        )
    bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if bad:
        first = bad[0]
        raise UserError(
            f"{reward.name} returned {scores[first].item()} for {len(bad)} of {expected} samples, first for the response "
            f"{samples.completions[first][:80]!r}; return a finite number for every response"
        )
    return scores
