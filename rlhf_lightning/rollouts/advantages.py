"""How a PPO iteration turns scores into advantages."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rlhf_lightning.functional.advantages import gae, whiten
from rlhf_lightning.functional.rewards import process_scores, token_rewards
from rlhf_lightning.rollouts.buffer import Rollout


class AdvantageEstimator(ABC):
    """Fills in a rollout's advantages and returns."""

    def processed(self, scores: Tensor, truncated: Tensor) -> Tensor:
        """The scores that the advantages are made of: here the raw ones. Shape (batch,), as both arguments."""
        return scores

    @abstractmethod
    def estimate(self, rollout: Rollout, *, kl_coef: float, all_sum: Callable[[Tensor], Tensor]) -> Rollout:
        """The rollout with advantages and returns.

        Args:
            rollout: Scored responses.
            kl_coef: Weight of the KL penalty.
            all_sum: Sums a scalar over ranks.
        """


@dataclass(frozen=True)
class GAE(AdvantageEstimator):
    """Generalised advantage estimation over rewards with the KL penalty inside.

    Attributes:
        gamma: Discount per token.
        gae_lambda: Bias-variance trade-off.
        missing_eos_penalty: Taken off the score of a response that was cut off before EOS.
        score_clip: Scores are clipped to plus or minus this; None leaves them.
        whiten_rewards: Scale the per-token rewards to unit variance (their mean stays).
        whiten_advantages: Scale the advantages of the rollout to mean 0 and unit variance. Without it the length of a step
            shrinks with the advantages, which all vanish at the optimum.
    """

    gamma: float = 1.0
    gae_lambda: float = 0.95
    missing_eos_penalty: float = 1.0
    score_clip: float | None = None
    whiten_rewards: bool = False
    whiten_advantages: bool = True

    def processed(self, scores: Tensor, truncated: Tensor) -> Tensor:
        """Clipped and penalised. Shape (batch,)."""
        return process_scores(scores, truncated, missing_eos_penalty=self.missing_eos_penalty, clip=self.score_clip)

    def estimate(self, rollout: Rollout, *, kl_coef: float, all_sum: Callable[[Tensor], Tensor]) -> Rollout:
        mask, scores = rollout.response_mask, self.processed(rollout.scores, rollout.truncated)
        rewards = token_rewards(scores, rollout.logprobs, rollout.ref_logprobs, mask, kl_coef=kl_coef)
        if self.whiten_rewards:
            rewards = whiten(rewards, mask, keep_mean=True, all_sum=all_sum)
        advantages, returns = gae(rewards, rollout.values, mask, gamma=self.gamma, gae_lambda=self.gae_lambda)
        if self.whiten_advantages:
            advantages = whiten(advantages, mask, all_sum=all_sum)
        return rollout.with_advantages(advantages, returns)
