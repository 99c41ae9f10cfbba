"""Losses that hold the log-ratio of each response to a level of its own, not to that of its twin.

So the level of the log-ratios counts, which a loss on their difference leaves free: with a reference that is off by a constant
they end elsewhere. Arguments and shapes as in :func:`rlhf_lightning.functional.preference.dpo_loss`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def nca_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float) -> Tensor:
    r"""Noise-contrastive alignment of a pair: chosen against both as noise, so that its likelihood does not fall.

    .. math:: \ell = -\log\sigma(\beta h_w) - \tfrac12 \log\sigma(-\beta h_w) - \tfrac12 \log\sigma(-\beta h_l)

    Source: Chen et al. 2024, https://arxiv.org/abs/2402.05369
    """
    chosen, rejected = beta * chosen_logratio, beta * rejected_logratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float) -> Tensor:
    r"""Binary classifier optimisation of a pair, without the shift: chosen is a one, rejected a zero.

    .. math:: \ell = -\log\sigma(\beta h_w) - \log\sigma(-\beta h_l)

    Source: Jung et al. 2024, https://arxiv.org/abs/2404.04656
    """
    return -F.logsigmoid(beta * chosen_logratio) - F.logsigmoid(-beta * rejected_logratio)


def sppo_hard_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float) -> Tensor:
    r"""Self-play preference optimisation with sure labels: each log-ratio has its own mark to hit.

    .. math:: \ell = \left(h_w - \frac{1}{2\beta}\right)^2 + \left(h_l + \frac{1}{2\beta}\right)^2

    Returns:
        Shape (pairs,), nats squared.

    Source: Wu et al. 2024, eq. 4.7 with win rates 1 and 0, https://arxiv.org/abs/2405.00675
    """
    mark = 1 / (2 * beta)
    return (chosen_logratio - mark).square() + (rejected_logratio + mark).square()


def apo_zero_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float) -> Tensor:
    r"""Anchored preference optimisation where the chosen are better than the model: chosen up, rejected down.

    .. math:: \ell = 1 - \sigma(\beta h_w) + \sigma(\beta h_l)

    Source: D'Oosterlinck et al. 2024, eq. 7, https://arxiv.org/abs/2408.06266
    """
    return torch.sigmoid(-beta * chosen_logratio) + torch.sigmoid(beta * rejected_logratio)


def apo_down_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float) -> Tensor:
    r"""Anchored preference optimisation where the model is better than the chosen: both down, the rejected further.

    .. math:: \ell = \sigma(\beta h_w) + 1 - \sigma(\beta(h_w - h_l))

    Source: D'Oosterlinck et al. 2024, eq. 8, https://arxiv.org/abs/2408.06266
    """
    return torch.sigmoid(beta * chosen_logratio) + torch.sigmoid(-beta * (chosen_logratio - rejected_logratio))
