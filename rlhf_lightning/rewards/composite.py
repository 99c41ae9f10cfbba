"""Several rewards at once."""

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards.reward import Reward, Samples, checked_scores


class WeightedRewards(Reward):
    """The weighted sum of several rewards; each one's mean is logged under its own name."""

    def __init__(self, rewards: list[Reward], weights: list[float] | None = None) -> None:
        """Args: the rewards, and a weight each (1 if not given)."""
        self.rewards = rewards
        self._parts: dict[str, Tensor] = {}
        self.weights = weights if weights is not None else [1.0] * len(rewards)
        if not rewards or len(self.weights) != len(rewards):
            raise UserError(f"{len(rewards)} rewards and {len(self.weights)} weights; give one weight a reward")

    def prepare(self, device: torch.device | str) -> None:
        for reward in self.rewards:
            reward.prepare(device)

    def networks(self) -> list[nn.Module]:
        return [network for reward in self.rewards for network in reward.networks()]

    def score(self, samples: Samples) -> Tensor:
        self._parts = {}
        for reward in self.rewards:
            name = reward.name if reward.name not in self._parts else f"{reward.name}_{len(self._parts)}"
            self._parts[name] = checked_scores(reward, samples).cpu()
        return torch.stack([w * s for w, s in zip(self.weights, self._parts.values(), strict=True)]).sum(0)

    def parts(self) -> dict[str, Tensor]:
        return self._parts
