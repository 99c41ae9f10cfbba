"""Baselines and scales over several responses to the same prompt: what takes the critic's place in RLOO, GRPO and relatives.

``groups`` says for each response which prompt it answers: any whole numbers, equal where the prompt is the same one. Rows of a
group need not stand together. ``all_sum`` sums a tensor over ranks; a group is never cut between ranks.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
AllSum = Callable[[Tensor], Tensor]
EPSILON = 1e-4  # as in the GRPO of TRL


def group_mean(x: Tensor, groups: Tensor) -> Tensor:
    """Mean over each response's own group. Arguments and result of shape (batch,)."""
    _, index, count = groups.unique(return_inverse=True, return_counts=True)
    total = torch.zeros(len(count), dtype=x.dtype, device=x.device).index_add(0, index, x)
    return (total / count)[index]


def group_sizes(groups: Tensor) -> Tensor:
    """How many responses each one's group has. Shape (batch,), int64."""
    _, index, count = groups.unique(return_inverse=True, return_counts=True)
    return count[index]


def group_std(x: Tensor, groups: Tensor) -> Tensor:
    """Unbiased standard deviation of each response's own group (of two or more). Arguments and result of shape (batch,)."""
    squares = group_mean((x - group_mean(x, groups)).square(), groups)
    sizes = group_sizes(groups)
    return (squares * sizes / (sizes - 1)).sqrt()


def without_signal(scores: Tensor, groups: Tensor) -> Tensor:
    """Whether all responses of a response's group have one score, from which no baseline can learn. Shape (batch,), bool."""
    return group_mean((scores - group_mean(scores, groups)).abs(), groups) <= 1e-6 * scores.abs().clamp(min=1)


def leave_one_out_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    r"""RLOO: each response against the mean of the others.

    .. math:: A_i = R_i - \frac{1}{k-1} \sum_{j \ne i} R_j = \frac{k}{k-1} (R_i - \bar R)

    Args:
        rewards: Of whole responses, the KL penalty inside where there is one. Shape (batch,).
        groups: Of k >= 2 responses each. Shape (batch,), int64.

    Returns:
        Shape (batch,); zero in sum over every group.

    Source: Kool et al. 2019; Ahmadian et al. 2024, section 3.2, https://arxiv.org/abs/2402.14740
    """
    sizes = group_sizes(groups)
    return (rewards - group_mean(rewards, groups)) * sizes / (sizes - 1)


def group_advantages(rewards: Tensor, groups: Tensor, *, scale: Scale, all_sum: AllSum) -> Tensor:
    r"""GRPO's advantage: each response against the mean of its group, in units of a standard deviation.

    .. math:: A_i = \frac{r_i - \mathrm{mean}(r)}{\mathrm{std}(r) + 10^{-4}}

    Dividing by the group's own deviation makes the pull to the reference beta times that deviation, prompt by prompt, and has
    groups that all but agree shout loudest; Dr.GRPO divides by nothing.

    Args:
        rewards: Of whole responses. Shape (batch,).
        groups: Of two or more responses each. Shape (batch,), int64.
        scale: Whose standard deviation (unbiased): "group", "batch" (over all ranks), or "none".
        all_sum: Sums a tensor over ranks.

    Returns:
        Shape (batch,); exactly zero where a group agrees.

    Source: Shao et al. 2024, section 4.1, https://arxiv.org/abs/2402.03300; "none": Liu et al. 2025, https://arxiv.org/abs/2503.20783;
    "batch": Liu et al. 2025 (Lite PPO), https://arxiv.org/abs/2508.08221
    """
    centred = (rewards - group_mean(rewards, groups)).masked_fill(without_signal(rewards, groups), 0)
    if scale == "group":
        return centred / (group_std(rewards, groups) + EPSILON)
    if scale == "batch":
        return centred / (batch_std(rewards, all_sum) + EPSILON)
    return centred


def batch_mean(x: Tensor, all_sum: AllSum) -> Tensor:
    """Mean over the responses of all ranks. ``x`` of shape (batch,); a scalar."""
    return all_sum(x.sum()) / all_sum(torch.tensor(float(len(x)), dtype=x.dtype, device=x.device))


def batch_std(x: Tensor, all_sum: AllSum) -> Tensor:
    """Unbiased standard deviation over the responses of all ranks. ``x`` of shape (batch,); a scalar."""
    count = all_sum(torch.tensor(float(len(x)), dtype=x.dtype, device=x.device))
    return (all_sum((x - batch_mean(x, all_sum)).square().sum()) / (count - 1).clamp(min=1)).sqrt()


def rewards_to_go(rewards: Tensor, mask: Tensor) -> Tensor:
    r"""What follows from each token on, undiscounted.

    .. math:: G_t = \sum_{s \ge t} r_s

    Args:
        rewards: Of each token. Shape (batch, length).
        mask: True on response tokens; a hole does not break the sum. Same shape, bool.

    Returns:
        Same shape, zero where masked.
    """
    counted = rewards.masked_fill(~mask, 0)
    return counted.flip(1).cumsum(1).flip(1).masked_fill(~mask, 0)
