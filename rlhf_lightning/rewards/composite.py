"""Several rewards at once."""

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import UserError
from rlhf_lightning.losses.checks import require_interface
from rlhf_lightning.rewards.reward import Reward, Samples, applicable_scores

if TYPE_CHECKING:
    from transformers import TrainerState


class WeightedRewards(Reward):
    """The weighted sum of several rewards; each one's mean is logged under its own name.

    A reward that does not apply to a sample adds nothing to its sum, and that sample does not count in its mean. A sample to
    which none applies has no score: it is an error, unless this is part of another sum that has one. Those that wait for
    other processes or servers (``waits``) are scored at the same time.
    """

    skips_special_tokens = False  # its rewards are asked each for itself

    def __init__(self, rewards: list[Reward], weights: list[float] | None = None) -> None:
        """Check the weights.

        Args:
            rewards: What is added up, one or more.
            weights: One for each reward; None for 1 each.
        """
        self.rewards = rewards
        self._parts: dict[str, Tensor] = {}
        self.weights = weights if weights is not None else [1.0] * len(rewards)
        if not rewards or len(self.weights) != len(rewards):
            raise UserError(f"{len(rewards)} rewards and {len(self.weights)} weights; give one weight a reward")
        for index, reward in enumerate(rewards):
            require_interface(f"rewards[{index}]", reward, Reward)
        self.logs_metrics = any(reward.logs_metrics for reward in rewards)
        self.reads_trainer_state = any(reward.reads_trainer_state for reward in rewards)

    def prepare(self, device: torch.device | str) -> None:
        for reward in self.rewards:
            reward.prepare(device)

    def networks(self) -> list[nn.Module]:
        return [network for reward in self.rewards for network in reward.networks()]

    def set_trainer_state(self, state: "TrainerState") -> None:
        for reward in self.rewards:
            reward.set_trainer_state(state)

    def logged_metrics(self) -> dict[str, list[float]]:
        """Those of all rewards; what several log under one name is one mean."""
        found: dict[str, list[float]] = {}
        for reward in self.rewards:
            for name, values in reward.logged_metrics().items():
                found[name] = found.get(name, []) + values
        return found

    def score(self, samples: Samples) -> Tensor | list[float | None]:
        self._parts = {}
        total, any_applies = torch.zeros(len(samples.prompts)), torch.zeros(len(samples.prompts), dtype=torch.bool)
        for reward, weight, (scores, applies) in zip(self.rewards, self.weights, self._scored(samples), strict=True):
            name = reward.name if reward.name not in self._parts else f"{reward.name}_{len(self._parts)}"
            scores, applies = scores.cpu(), applies.cpu()
            self._parts[name] = scores.masked_fill(~applies, float("nan"))
            total, any_applies = total + weight * scores, any_applies | applies
        if any_applies.all():
            return total
        return [score if ok else None for score, ok in zip(total.tolist(), any_applies.tolist(), strict=True)]

    def _scored(self, samples: Samples) -> list[tuple[Tensor, Tensor]]:
        waiting = [i for i, reward in enumerate(self.rewards) if reward.waits]
        with ThreadPoolExecutor(max(len(waiting), 1), thread_name_prefix="reward") as pool:
            futures = {i: pool.submit(applicable_scores, self.rewards[i], samples) for i in waiting}
            # The others one after the other and in this thread, which is where autocast and the current device are set.
            now = {i: applicable_scores(r, samples) for i, r in enumerate(self.rewards) if i not in futures}
            return [now[i] if i in now else futures[i].result() for i in range(len(self.rewards))]

    def parts(self) -> dict[str, Tensor]:
        """Scores before the weights, NaN where a reward does not apply."""
        return self._parts
