"""How sure a reward model may be: the temperature at which its score differences are log-odds."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_lightning.functional.ranking import expected_calibration_error

COLDEST, HOTTEST, HALVINGS = 1e-3, 1e3, 50  # the temperature is sought between these


def fit_temperature(difference: Tensor, *, all_sum: Callable[[Tensor], Tensor] | None = None) -> float:
    r"""The temperature under which held-out preferences are likeliest.

    .. math:: T = \arg\min_T \; -\sum_i \log \sigma(\Delta_i / T)

    The sum is convex in :math:`a = 1/T`, so its slope :math:`-\sum_i \Delta_i \sigma(-a \Delta_i)` changes sign once: it is
    followed by halving an interval of :math:`\log a`, in float64.

    Args:
        difference: Score of the chosen minus score of the rejected response, at the scale of training. Shape (pairs,).
        all_sum: Sums a tensor over ranks that hold some of the pairs each; None where there is one rank.

    Returns:
        The temperature; an end of [1e-3, 1e3] where no finite one is best: nothing is ordered wrongly, or nothing is learnt.

    Source: Guo et al. 2017, section 4.2, https://arxiv.org/abs/1706.04599
    """
    difference = difference.double()
    low, high = torch.tensor([1 / HOTTEST, 1 / COLDEST], dtype=torch.float64).log().tolist()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        steepness = torch.tensor(middle, dtype=torch.float64).exp().to(difference.device)
        slope = -(difference * torch.sigmoid(-steepness * difference)).sum()
        slope = slope if all_sum is None else all_sum(slope)
        low, high = (middle, high) if slope <= 0 else (low, middle)
    return float(torch.tensor(-(low + high) / 2, dtype=torch.float64).exp())


def first_half(groups: Tensor) -> Tensor:
    """Divide pairs into two halves that share no group, whatever the order of the pairs.

    Args:
        groups: What pairs must stay together by, for instance a hash of their prompt. Shape (pairs,), int64.

    Returns:
        True for the pairs of the first half of the groups, in ascending order. Shape (pairs,), bool.
    """
    distinct = groups.unique()
    return torch.isin(groups, distinct[: (len(distinct) + 1) // 2])


def held_out_calibration(difference: Tensor, fitted: Tensor) -> tuple[Tensor, float, float]:
    """Fit a temperature to some pairs, and measure on the others what it changes.

    Args:
        difference: Score of the chosen minus score of the rejected response, by each member. Shape (pairs, members).
        fitted: True for the pairs that temperatures are fitted to; the calibration error is that of the others.
            Shape (pairs,), bool.

    Returns:
        The temperature of each member, shape (members,), float32; the calibration error without and with it, means over the
        members.
    """
    temperature = torch.tensor([fit_temperature(member) for member in difference[fitted].unbind(-1)])
    others = difference[~fitted].float()
    before, after = (
        float(torch.stack([expected_calibration_error(member) for member in scaled.unbind(-1)]).mean())
        for scaled in (others, others / temperature)
    )
    return temperature, before, after
