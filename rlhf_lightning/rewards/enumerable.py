"""The reward table of an enumerable world."""

import torch
from torch import Tensor

from rlhf_lightning.rewards.reward import Reward, Samples
from rlhf_lightning.worlds import EnumerableWorld


class EnumerableReward(Reward):
    """Looks a response up, by its token ids: the very table that the world's optimum is computed from."""

    def __init__(self, world: EnumerableWorld) -> None:
        """Remember the world.

        Args:
            world: The world that the prompts come from, with its seed.
        """
        self.world = world

    @property
    def name(self) -> str:
        return "table"

    def score(self, samples: Samples) -> Tensor:
        rows = zip(samples.prompts, samples.completion_ids, strict=True)
        return torch.tensor([self.world.reward(prompt, ids) for prompt, ids in rows], dtype=torch.float32)
