"""How sure a reward model may be: the temperature at which its score differences are log-odds."""

from collections.abc import Callable

import torch
from torch import Tensor

STEEPEST, HALVINGS = 1e3, 50  # the temperature is sought in [1e-3, 1e3]


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
    low, high = torch.tensor([1 / STEEPEST, STEEPEST], dtype=torch.float64).log().tolist()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        steepness = torch.tensor(middle, dtype=torch.float64).exp().to(difference.device)
        slope = -(difference * torch.sigmoid(-steepness * difference)).sum()
        slope = slope if all_sum is None else all_sum(slope)
        low, high = (middle, high) if slope <= 0 else (low, middle)
    return float(torch.tensor(-(low + high) / 2, dtype=torch.float64).exp())
