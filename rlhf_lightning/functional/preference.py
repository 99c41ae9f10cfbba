"""Losses on pairs of responses that need no reward model: DPO and IPO.

``chosen_logratio`` is log policy - log reference of a whole response, EOS included; the *implicit reward* is beta times it.
"""

import torch.nn.functional as F
from torch import Tensor


def dpo_loss(
    chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    r"""Direct preference optimisation; with smoothing the conservative cDPO.

    .. math:: \ell = -(1-\epsilon) \log\sigma(\beta(h_w - h_l)) - \epsilon \log\sigma(-\beta(h_w - h_l))

    Args:
        chosen_logratio: h_w, summed over the chosen response. Shape (pairs,), nats.
        rejected_logratio: h_l, the same of the rejected one. Shape (pairs,).
        beta: Strength of the pull to the reference, > 0.
        label_smoothing: Probability that a label is flipped, in [0, 1/2).

    Returns:
        Shape (pairs,), nats.

    Source: Rafailov et al. 2023, eq. 7, https://arxiv.org/abs/2305.18290; smoothing: Mitchell 2023, "A note on DPO with
    noisy preferences", eq. 3.
    """
    logits = beta * (chosen_logratio - rejected_logratio)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, *, tau: float) -> Tensor:
    r"""Identity preference optimisation: a margin to reach, not to exceed, so that sure labels do not run away.

    .. math:: \ell = \left(h_w - h_l - \frac{1}{2\tau}\right)^2

    With *summed* log-ratios, as in the paper (TRL averages them over tokens, which is another loss).

    Args:
        chosen_logratio: h_w. Shape (pairs,), nats.
        rejected_logratio: h_l. Shape (pairs,).
        tau: Strength of the pull to the reference, > 0.

    Returns:
        Shape (pairs,), nats squared.

    Source: Azar et al. 2023, eq. 17, https://arxiv.org/abs/2310.12036
    """
    return (chosen_logratio - rejected_logratio - 1 / (2 * tau)).square()
