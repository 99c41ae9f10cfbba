"""Advantage estimators: from per-token rewards and values to what the policy gradient is weighted with.

Every function has time on the last axis and takes a bool ``mask`` that is True where a token counts, and
returns zeros where it does not.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_lightning.functional.masked import masked_sum


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    r"""Generalised advantage estimation over one response per row.

    .. math:: \delta_t = r_t + \gamma V_{t+1} - V_t, \qquad A_t = \sum_{l \ge 0} (\gamma\lambda)^l \delta_{t+l}

    The value after the last counted token is zero: a response that was cut off is treated as finished (penalise it in
    the reward instead). Masked tokens between counted ones (a tool's output, say) take no time: the token that follows
    :math:`t` is the next counted one, and nothing is discounted across the hole.

    Args:
        rewards: Reward of each response token, KL penalty included. Shape (batch, length), float32.
        values: Critic's value *before* each token. Shape (batch, length), float32.
        mask: True on response tokens that count; holes are allowed. Shape (batch, length), bool.
        gamma: Discount per token, in [0, 1]; 1 for language models.
        gae_lambda: Bias-variance trade-off, in [0, 1]; 1 gives Monte-Carlo returns.

    Returns:
        Advantages and returns (the critic's targets, ``advantages + values``), each (batch, length), zero where masked.

    Raises:
        ValueError: If the shapes differ.

    Source: Schulman et al. 2016, eq. 16, https://arxiv.org/abs/1506.02438
    """
    if not rewards.shape == values.shape == mask.shape:
        raise ValueError(
            f"rewards {tuple(rewards.shape)}, values {tuple(values.shape)} and mask {tuple(mask.shape)} differ"
        )
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)  # padding may hold anything, NaN too
    advantages = torch.zeros_like(rewards)
    following_advantage = following_value = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        advantage = delta + gamma * gae_lambda * following_advantage
        following_advantage = torch.where(mask[:, t], advantage, following_advantage)
        following_value = torch.where(mask[:, t], values[:, t], following_value)
        advantages[:, t] = advantage
    advantages = advantages.masked_fill(~mask, 0)
    return advantages, advantages + values


def whiten(
    x: Tensor, mask: Tensor, *, keep_mean: bool = False, all_sum: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Scale the counted entries to unit variance and, unless ``keep_mean``, to zero mean.

    Statistics are over every counted token of the batch given and, through ``all_sum``, of every rank's batch: without it
    each rank would whiten alone.

    Args:
        x: Values to whiten. Any shape, float32.
        mask: True where an entry counts. Same shape as ``x``, bool.
        keep_mean: Put the mean back after scaling (used for rewards, whose level carries meaning).
        all_sum: Sums a scalar over ranks; None where there is one rank.

    Returns:
        Whitened values, zero where masked.

    Source: lm-human-preferences (Ziegler et al. 2019, https://arxiv.org/abs/1909.08593); variance is unbiased as in TRL.
    """
    total = all_sum if all_sum is not None else _alone
    x = x.masked_fill(~mask, 0)
    count = total(mask.sum())
    mean = total(masked_sum(x, mask)) / count
    variance = total(masked_sum((x - mean).square(), mask)) / (count - 1).clamp(min=1)
    scaled = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (scaled + mean if keep_mean else scaled).masked_fill(~mask, 0)


def _alone(x: Tensor) -> Tensor:
    return x
