"""The critic's loss and how well it explains the returns."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_lightning.functional.masked import masked_sum


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_range: float
) -> tuple[Tensor, Tensor]:
    r"""Squared error, with the change of the value since the rollout clipped as the policy's ratio is.

    .. math:: \ell_t = \tfrac12 \max\left((v_t - \hat R_t)^2, (\mathrm{clip}(v_t, v^{old}_t \pm \epsilon) - \hat R_t)^2\right)

    Args:
        values: Of the critic being trained. Shape (batch, length).
        old_values: At the time of the rollout. Same shape.
        returns: Targets. Same shape.
        mask: True on response tokens. Same shape, bool.
        clip_range: epsilon in units of the return, > 0.

    Returns:
        The loss of each token, and whether the clip decided it (bool, detached); zero and False where masked.

    Source: OpenAI baselines' ppo2, as in Huang et al. 2024, https://arxiv.org/abs/2403.17031
    """
    values, old_values, returns = (x.masked_fill(~mask, 0) for x in (values, old_values, returns))
    free = (values - returns).square()
    clipped = (values.clamp(old_values - clip_range, old_values + clip_range) - returns).square()
    return 0.5 * torch.maximum(free, clipped), (clipped > free).detach() & mask


def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, *, all_sum: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    r"""How much of the spread of the returns the critic foresaw: :math:`1 - \mathrm{Var}(\hat R - v) / \mathrm{Var}(\hat R)`.

    Args and shapes as in :func:`clipped_value_loss`; ``all_sum`` as in :func:`.advantages.whiten`: without it the answer is
    that of one rank's rows.

    Returns:
        Scalar, at most 1; 0 for a constant critic, NaN where the returns do not vary.
    """
    total = all_sum if all_sum is not None else _alone
    spread = _squared_deviations(returns, mask, total)
    return torch.where(spread > 0, 1 - _squared_deviations(returns - values, mask, total) / spread, torch.nan)


def _squared_deviations(x: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum of the counted entries' squared distances from their mean; a scalar."""
    x = x.masked_fill(~mask, 0)  # else NaN there would reach the gradient of the square
    mean = total(masked_sum(x, mask)) / total(mask.sum())
    return total(masked_sum((x - mean).square(), mask))


def _alone(x: Tensor) -> Tensor:
    return x
