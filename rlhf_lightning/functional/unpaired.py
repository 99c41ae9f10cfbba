"""Losses on single responses that somebody liked or disliked: KTO, its variant without a baseline, and BCO.

``logratio`` is h = log policy - log reference of a whole response, EOS included, and ``baseline`` what it is compared with.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def kto_loss(
    logratio: Tensor,
    desirable: Tensor,
    baseline: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    r"""Kahneman-Tversky optimisation: a gain or a loss against a reference point, each felt less the larger it is.

    .. math::
        \ell = \lambda_D \left(1 - \sigma(\beta (h - z_0))\right) \text{ if desirable, else }
               \lambda_U \left(1 - \sigma(\beta (z_0 - h))\right)

    With baseline zero it is APO-zero on unpaired data.

    Args:
        logratio: h. Shape (rows,), nats.
        desirable: True where the response was liked. Shape (rows,), bool.
        baseline: z0 of :func:`kto_baseline`, or zero. Scalar, nats, without gradient.
        beta: Strength of the pull to the reference, > 0.
        desirable_weight: lambda_D, >= 0.
        undesirable_weight: lambda_U, >= 0.

    Returns:
        Shape (rows,), each in [0, its weight].

    Source: Ethayarajh et al. 2024, eq. 7, https://arxiv.org/abs/2402.01306; with z0 = 0: D'Oosterlinck et al. 2024,
    APO-zero, https://arxiv.org/abs/2408.06266, on single responses as in TRL.
    """
    sign, weight = _sides(desirable, logratio, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(-sign * beta * (logratio - baseline))


def bco_unpaired_loss(
    logratio: Tensor,
    desirable: Tensor,
    baseline: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    r"""Binary classifier optimisation: is the response a liked one, told by its implicit reward?

    .. math:: \ell = -\log\sigma(\beta h - \Delta) \text{ if desirable, else } -\log\sigma(\Delta - \beta h)

    Args:
        logratio: h. Shape (rows,), nats.
        desirable: True where the response was liked. Shape (rows,), bool.
        baseline: Running mean of h over all responses so far; the paper's shift Delta is beta times it. Scalar, nats.
        beta: Strength of the pull to the reference, > 0.
        desirable_weight: Factor of the liked responses, >= 0.
        undesirable_weight: Factor of the others, >= 0.

    Returns:
        Shape (rows,), nats.

    Source: Jung et al. 2024, with the reward shift, https://arxiv.org/abs/2404.04656
    """
    sign, weight = _sides(desirable, logratio, desirable_weight, undesirable_weight)
    return -weight * torch.nn.functional.logsigmoid(sign * beta * (logratio - baseline))


def kto_baseline(mismatched_logratio: Tensor, *, all_sum: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    r"""KTO's reference point: how far the policy has gone from the reference, by responses to other prompts.

    .. math:: z_0 = \max\left(0, \text{mean} \log \frac{\pi(y'|x)}{\pi_{ref}(y'|x)}\right)

    The mean is over the responses of all ranks, and only then cut off at zero. It is a biased estimate of the KL, and one of
    a micro-batch: other micro-batches have other estimates.

    Args:
        mismatched_logratio: Of prompts with a response to another prompt. Shape (rows,), nats; may be empty.
        all_sum: Sums a tensor over ranks; None where there is one rank.

    Returns:
        Scalar, nats, without gradient; zero where no rank has a row.

    Source: Ethayarajh et al. 2024, section 4.1, https://arxiv.org/abs/2402.01306
    """
    ratios = mismatched_logratio.detach()
    counted = torch.stack([ratios.sum(), ratios.new_tensor(float(len(ratios)))])
    total, count = counted if all_sum is None else all_sum(counted)
    return (total / count.clamp(min=1)).clamp(min=0)


def _sides(
    desirable: Tensor, like: Tensor, desirable_weight: float, undesirable_weight: float
) -> tuple[Tensor, Tensor]:
    """+1 or -1, and the weight, of each row."""
    liked = desirable.to(like.dtype)
    return 2 * liked - 1, desirable_weight * liked + undesirable_weight * (1 - liked)
