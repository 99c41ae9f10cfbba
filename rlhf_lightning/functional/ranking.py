"""Losses and diagnostics of reward models: what a comparison of two responses says about two scores."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | float = 0.0, probability: Tensor | None = None
) -> Tensor:
    r"""Negative log-likelihood of the preferences under Bradley-Terry.

    .. math:: \ell = -p \log \sigma(\Delta) - (1 - p) \log \sigma(-\Delta), \quad \Delta = r_w - r_l - m

    Args:
        chosen: Scores of the preferred responses. Shape (pairs,), float32.
        rejected: Scores of the others. Shape (pairs,).
        margin: By how much the chosen one should lead, >= 0. A scalar or shape (pairs,).
        probability: That the chosen one is the better one, in [0, 1]: 1/2 for a tie. Shape (pairs,); None for 1.

    Returns:
        Shape (pairs,), nats. Of a soft label the least value is its entropy.

    Source: Ouyang et al. 2022, eq. 1, https://arxiv.org/abs/2203.02155; margin: Touvron et al. 2023, eq. 2,
    https://arxiv.org/abs/2307.09288
    """
    lead = chosen - rejected - margin
    if probability is None:
        return -F.logsigmoid(lead)
    return -probability * F.logsigmoid(lead) - (1 - probability) * F.logsigmoid(-lead)


def centering_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    r"""Pull the sum of a pair's scores to zero: :math:`(r_w + r_l)^2`. Bradley-Terry alone leaves the level free.

    Args and shapes as in :func:`bradley_terry_loss`.

    Source: Eisenstein et al. 2023, eq. 2, https://arxiv.org/abs/2312.09244
    """
    return (chosen + rejected).square()


def preference_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen response scores higher, 1/2 on a tie, else 0. Shape (pairs,), float32."""
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()


def expected_calibration_error(
    difference: Tensor, *, bins: int = 5, all_sum: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    r"""How far the confidence of pairwise predictions is from their accuracy.

    .. math:: \sum_b \frac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b|

    Args:
        difference: Score of the chosen minus score of the rejected response, at scale 1. Shape (pairs,).
        bins: Number of equal bins of the confidence max(p, 1 - p) in [1/2, 1].
        all_sum: Sums a tensor over ranks that hold some of the pairs each; None where there is one rank.

    Returns:
        Scalar in [0, 1].

    Raises:
        ValueError: If there is no pair; with ``all_sum`` another rank may have some.

    Source: Guo et al. 2017, eq. 3, https://arxiv.org/abs/1706.04599
    """
    if difference.numel() == 0 and all_sum is None:
        raise ValueError("calibration needs at least one pair")
    confidence = torch.sigmoid(difference.abs())
    correct = preference_accuracy(difference, torch.zeros_like(difference))
    index = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    errors = correct - confidence
    gap = errors.new_zeros(bins).index_add_(0, index, errors)
    counted = torch.cat([gap, gap.new_tensor([difference.numel()])])
    counted = counted if all_sum is None else all_sum(counted)
    return counted[:-1].abs().sum() / counted[-1]
