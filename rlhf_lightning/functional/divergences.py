r"""What takes the place of the log-ratio where another divergence than the KL holds the policy to its reference.

With a regulariser :math:`\beta D_f(\pi \| \pi_{ref})` the reward of a policy's optimum is :math:`\beta f'(u) + c(x)`,
:math:`u = \pi / \pi_{ref}`; its difference within a pair is what the loss is put on. Constants of f' cancel there and are left
out. The reverse KL has f'(u) = log u, which is DPO. Source: Wang et al. 2023,
https://arxiv.org/abs/2309.16240
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 80.0  # nats: beyond, float32 has no exponential, and a gradient would be infinity times zero


def forward_kl_score(logratio: Tensor) -> Tensor:
    r"""Of :math:`KL(\pi_{ref} \| \pi)`: :math:`-e^{-h}`.

    Args:
        logratio: h = log u. Any shape, nats.

    Returns:
        Same shape.
    """
    return -torch.exp((-logratio).clamp(max=MOST))


def jensen_shannon_score(logratio: Tensor) -> Tensor:
    r"""Of the Jensen-Shannon divergence: :math:`\log\sigma(h)`. Argument and result as in :func:`forward_kl_score`."""
    return F.logsigmoid(logratio)


def alpha_score(logratio: Tensor, *, alpha: float) -> Tensor:
    r"""Of an alpha-divergence: :math:`(e^{(\alpha - 1) h} - 1) / (\alpha - 1)`; the forward KL at 0, the reverse KL near 1.

    The paper's alpha is one minus this one, which is TRL's.

    Args:
        logratio: As in :func:`forward_kl_score`.
        alpha: In (0, 1).

    Returns:
        Same shape.
    """
    return torch.expm1(((alpha - 1) * logratio).clamp(max=MOST)) / (alpha - 1)
