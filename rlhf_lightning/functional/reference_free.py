"""Losses that need no reference: the policy's own log-probabilities are the rewards.

``logps`` are sums over a response, ``means`` are means over its tokens; EOS is one of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.functional.preference import dpo_loss


def cpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    r"""The contrast of contrastive preference optimisation: DPO under a uniform reference.

    .. math:: \ell = -\log\sigma(\beta (\log\pi(y_w) - \log\pi(y_l)))

    Alone it lets both likelihoods fall: the method adds the likelihood of the chosen response.

    Args:
        chosen_logps: Shape (pairs,), nats.
        rejected_logps: Shape (pairs,).
        beta: Scale of the implicit reward, > 0.
        label_smoothing: As in DPO.

    Returns:
        Shape (pairs,), nats.

    Source: Xu et al. 2024, https://arxiv.org/abs/2401.08417
    """
    return dpo_loss(chosen_logps, rejected_logps, beta=beta, label_smoothing=label_smoothing)


def simpo_loss(chosen_means: Tensor, rejected_means: Tensor, *, beta: float, gamma: float) -> Tensor:
    r"""Simple preference optimisation: the mean log-probability is the reward, and it shall lead by a margin.

    .. math:: \ell = -\log\sigma(\beta (\bar\ell_w - \bar\ell_l) - \gamma)

    Args:
        chosen_means: Mean log-probability of a token of the chosen response. Shape (pairs,), nats.
        rejected_means: Shape (pairs,).
        beta: Scale of the reward, > 0; about 2, for means are small.
        gamma: Margin of the rewards, >= 0.

    Returns:
        Shape (pairs,), nats.

    Source: Meng et al. 2024, eq. 6, https://arxiv.org/abs/2405.14734
    """
    return -F.logsigmoid(beta * (chosen_means - rejected_means) - gamma)


def log_odds(means: Tensor) -> Tensor:
    r"""Log-odds of a response whose probability is its tokens' geometric mean: :math:`\bar\ell - \log(1 - e^{\bar\ell})`.

    Args:
        means: Mean log-probability of a token, <= 0. Any shape, nats. A response that is certain to the last digit counts as
            one that is certain but for the least step of its float type: its odds would be infinite.

    Returns:
        Same shape, nats.

    Source: Hong et al. 2024, eq. 4, https://arxiv.org/abs/2403.07691
    """
    below = means.clamp(max=-torch.finfo(means.dtype).eps)
    return below - torch.log(-torch.expm1(below))


def odds_ratio_loss(chosen_means: Tensor, rejected_means: Tensor) -> Tensor:
    r"""ORPO's contrast, to be added to the likelihood of the chosen response.

    .. math:: \ell = -\log\sigma(\mathrm{logodds}_w - \mathrm{logodds}_l)

    Args:
        chosen_means: As in :func:`log_odds`. Shape (pairs,).
        rejected_means: Shape (pairs,).

    Returns:
        Shape (pairs,), nats.

    Source: Hong et al. 2024, eq. 7, https://arxiv.org/abs/2403.07691
    """
    return -F.logsigmoid(log_odds(chosen_means) - log_odds(rejected_means))
