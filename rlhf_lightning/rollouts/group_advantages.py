"""Advantages without a critic: from the scores of several responses to a prompt."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlhf_lightning.functional.advantages import whiten
from rlhf_lightning.functional.groups import (
    Scale,
    batch_mean,
    group_advantages,
    group_mean,
    leave_one_out_advantages,
    rewards_to_go,
)
from rlhf_lightning.functional.kl import kl_k1
from rlhf_lightning.functional.masked import masked_sum
from rlhf_lightning.functional.rewards import process_scores, token_rewards
from rlhf_lightning.rollouts.advantages import AdvantageEstimator
from rlhf_lightning.rollouts.buffer import Rollout

AllSum = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class CriticFree(AdvantageEstimator):
    """Advantages from scores alone.

    Attributes:
        missing_eos_penalty: Taken off the score of a response that was cut off before EOS.
        score_clip: Scores are clipped to plus or minus this; None leaves them.
        least_group: Responses to a prompt without which they have no meaning.
        needs_greedy: Whether the score of the greedy response is the baseline.
    """

    missing_eos_penalty: float = 0.0
    score_clip: float | None = None
    least_group: ClassVar[int] = 1
    needs_greedy: ClassVar[bool] = False

    def processed(self, scores: Tensor, truncated: Tensor) -> Tensor:
        """Clipped and penalised. Shape (batch,)."""
        return process_scores(scores, truncated, missing_eos_penalty=self.missing_eos_penalty, clip=self.score_clip)


@dataclass(frozen=True)
class ResponseAdvantages(CriticFree):
    """One advantage a response, which all its tokens share."""

    def estimate(self, rollout: Rollout, *, kl_coef: float, all_sum: AllSum) -> Rollout:
        mask = rollout.response_mask
        penalties = kl_coef * masked_sum(kl_k1(rollout.logprobs - rollout.ref_logprobs), mask, dim=1)
        rewards = self.processed(rollout.scores, rollout.truncated) - penalties
        advantages = self.of_responses(rewards, rollout, all_sum)
        return rollout.with_advantages(advantages[:, None].expand(mask.shape).masked_fill(~mask, 0), rollout.returns)

    @abstractmethod
    def of_responses(self, rewards: Tensor, rollout: Rollout, all_sum: AllSum) -> Tensor:
        """The advantages. Shape (batch,).

        Args:
            rewards: Scores, less the KL penalty where it stands in the reward. Shape (batch,).
            rollout: With its groups.
            all_sum: Sums a tensor over ranks.
        """


@dataclass(frozen=True)
class LeaveOneOut(ResponseAdvantages):
    """RLOO: :func:`rlhf_lightning.functional.groups.leave_one_out_advantages`."""

    least_group: ClassVar[int] = 2

    def of_responses(self, rewards: Tensor, rollout: Rollout, all_sum: AllSum) -> Tensor:
        return leave_one_out_advantages(rewards, rollout.groups)


@dataclass(frozen=True)
class GroupMean(ResponseAdvantages):
    """GRPO's, in units of the deviation of the group, of the batch, or of none (Dr.GRPO).

    The mean counts the response itself, which leaves (k-1)/k of its reward beside a KL in the loss.
    See :func:`rlhf_lightning.functional.groups.group_advantages`.

    Attributes:
        scale: Deviation that advantages are divided by: of the "group", of the "batch", or "none".
    """

    scale: Scale = "group"
    least_group: ClassVar[int] = 2

    def of_responses(self, rewards: Tensor, rollout: Rollout, all_sum: AllSum) -> Tensor:
        return group_advantages(rewards, rollout.groups, scale=self.scale, all_sum=all_sum)


@dataclass(frozen=True)
class BatchMean(ResponseAdvantages):
    """REINFORCE with the mean over all responses of the iteration as its baseline (Williams 1992)."""

    def of_responses(self, rewards: Tensor, rollout: Rollout, all_sum: AllSum) -> Tensor:
        return rewards - batch_mean(rewards, all_sum)


@dataclass(frozen=True)
class GreedyBaseline(ResponseAdvantages):
    """ReMax: against the score of the greedy response (Li et al. 2023, https://arxiv.org/abs/2310.10505)."""

    needs_greedy: ClassVar[bool] = True

    def of_responses(self, rewards: Tensor, rollout: Rollout, all_sum: AllSum) -> Tensor:
        return rewards - rollout.baselines


@dataclass(frozen=True)
class ReturnToGo(CriticFree):
    """REINFORCE++: what follows each token, KL penalty and all, whitened over the tokens of the iteration.

    Source: Hu et al. 2025, https://arxiv.org/abs/2501.03262

    Attributes:
        group_baseline: First take the group's mean off the scores ("REINFORCE++-baseline"). The mean counts the response
            itself, which leaves (k-1)/k of its reward beside a KL that stays whole.
        whiten: Mean 0 and unit variance over all ranks. With it the length of a step does not shrink with the advantages,
            which all vanish at the optimum: let the learning rate decay.
    """

    group_baseline: bool = False
    whiten: bool = True

    def estimate(self, rollout: Rollout, *, kl_coef: float, all_sum: AllSum) -> Rollout:
        mask, scores = rollout.response_mask, self.processed(rollout.scores, rollout.truncated)
        if self.group_baseline:
            scores = scores - group_mean(scores, rollout.groups)
        rewards = token_rewards(scores, rollout.logprobs, rollout.ref_logprobs, mask, kl_coef=kl_coef)
        advantages = rewards_to_go(rewards, mask)
        if self.whiten:
            advantages = whiten(advantages, mask, all_sum=all_sum)
        return rollout.with_advantages(advantages, torch.zeros_like(advantages))
