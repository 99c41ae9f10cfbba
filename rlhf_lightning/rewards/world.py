"""The true reward of an embedded world: what a learnt reward only stands in for."""

import torch
from torch import Tensor

from rlhf_lightning.rewards.reward import Reward, Samples
from rlhf_lightning.worlds import HHHWorld, SumsWorld


class GoldReward(Reward):
    """The world's own reward. For evaluation, and for asking how much is lost by learning a reward instead."""

    def __init__(self, world: HHHWorld | SumsWorld) -> None:
        """Remember the world.

        Args:
            world: The world, with the seed that made the prompts.
        """
        self.world = world

    @property
    def name(self) -> str:
        return "gold"

    def score(self, samples: Samples) -> Tensor:
        rows = zip(samples.prompts, samples.completions, samples.truncated, strict=True)
        return torch.tensor(
            [self.world.gold(prompt, text, truncated=cut).reward for prompt, text, cut in rows], dtype=torch.float32
        )
