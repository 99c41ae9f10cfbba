"""Losses on how far the log-ratio of the chosen response leads: DPO and those that put another curve on the same lead.

``chosen_logratio`` is log policy - log reference of a whole response, EOS included; the *implicit reward* is beta times it.
Where a formula takes scores of another kind (means over tokens, scores of an f-divergence), its class in ``losses/`` says so.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Gather = Callable[[Tensor], tuple[Tensor, int]]


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


def robust_dpo_loss(
    chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float, label_smoothing: float
) -> Tensor:
    r"""DPO made unbiased for labels of which a known share is flipped: its mean over noisy labels is DPO's over clean ones.

    .. math:: \ell = \frac{-(1-\epsilon) \log\sigma(\beta\delta) + \epsilon \log\sigma(-\beta\delta)}{1 - 2\epsilon}
        \qquad \delta = h_w - h_l

    It has no lower bound, and on labels without noise it overshoots.

    Args and shapes as in :func:`dpo_loss`.

    Source: Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409
    """
    logits = beta * (chosen_logratio - rejected_logratio)
    noisy = -(1 - label_smoothing) * F.logsigmoid(logits) + label_smoothing * F.logsigmoid(-logits)
    return noisy / (1 - 2 * label_smoothing)


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


def hinge_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float) -> Tensor:
    r"""SLiC's hinge on the implicit rewards: a lead of 1 is enough.

    .. math:: \ell = \max(0, 1 - \beta(h_w - h_l))

    Args and shapes as in :func:`dpo_loss`.

    Source: Zhao et al. 2023, https://arxiv.org/abs/2305.10425 (there without a reference); Liu et al. 2023,
    https://arxiv.org/abs/2309.06657
    """
    return F.relu(1 - beta * (chosen_logratio - rejected_logratio))


def exo_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    r"""Efficient exact optimisation of a pair: the *reverse* KL from the model's preference to the smoothed label.

    .. math:: \ell = q \log\frac{q}{1-\epsilon} + (1-q) \log\frac{1-q}{\epsilon} \qquad q = \sigma(\beta(h_w - h_l))

    Args and shapes as in :func:`dpo_loss`; ``label_smoothing`` in (0, 1/2), for a sure label has no finite reverse KL.

    Source: Ji et al. 2024, eq. 16, https://arxiv.org/abs/2402.00856
    """
    logits = beta * (chosen_logratio - rejected_logratio)
    flipped = torch.as_tensor(label_smoothing, dtype=logits.dtype, device=logits.device)
    right = torch.sigmoid(logits) * (F.logsigmoid(logits) - torch.log1p(-flipped))
    return right + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - flipped.log())


def discopop_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float, tau: float) -> Tensor:
    r"""Log-ratio modulated loss: logistic for pairs that are in the wrong order, exponential for those in the right one.

    .. math:: \ell = -(1 - g) \log\sigma(x) + g e^{-x} \qquad x = \beta(h_w - h_l), \quad g = \sigma(x / \tau)

    Args:
        chosen_logratio: As in :func:`dpo_loss`, like the next two.
        rejected_logratio: Same.
        beta: Same.
        tau: Over what stretch of x the one becomes the other, > 0.

    Returns:
        Shape (pairs,). Near a lead of zero it grows with the lead: a policy that starts at its reference falls back first.

    Source: Lu et al. 2024, eq. 5, https://arxiv.org/abs/2406.08414
    """
    logits = beta * (chosen_logratio - rejected_logratio)
    exponential = torch.exp(F.logsigmoid(logits / tau) - logits)  # g e^-x at once: apart, zero meets infinity
    return exponential - torch.sigmoid(-logits / tau) * F.logsigmoid(logits)


def dpop_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float, penalty: float) -> Tensor:
    r"""DPO-positive: a chosen response that has become less likely than under the reference counts against its lead.

    .. math:: \ell = -\log\sigma\big(\beta (h_w - h_l - \lambda \max(0, -h_w))\big)

    Args:
        chosen_logratio: As in :func:`dpo_loss`, like the next two.
        rejected_logratio: Same.
        beta: Same.
        penalty: Lambda, what a nat that the chosen response has lost weighs beside a nat of lead. 0 is DPO.

    Returns:
        Shape (pairs,).

    Source: Pal et al. 2024, eq. 3, https://arxiv.org/abs/2402.13228
    """
    lost = F.relu(-chosen_logratio)
    return -F.logsigmoid(beta * (chosen_logratio - rejected_logratio - penalty * lost))


def aot_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    gather: Gather | None = None,
) -> Tensor:
    r"""Alignment by optimal transport: the policy's margins as a *distribution* shall lead the reference's.

    .. math:: \ell_i = -\log\sigma(\beta (m_{(i)} - \bar m_{(i)})) \qquad m = \log\pi(y_w) - \log\pi(y_l)

    where the i-th smallest margin of the policy meets the i-th smallest of the reference, among all pairs of the step.

    Args:
        chosen_logps: Of the policy, summed over the chosen response. Shape (pairs,), nats.
        rejected_logps: The same of the rejected one. Shape (pairs,).
        ref_chosen_logps: Of the reference. Shape (pairs,).
        ref_rejected_logps: Of the reference. Shape (pairs,).
        beta: As in :func:`dpo_loss`.
        label_smoothing: As in :func:`dpo_loss`.
        gather: Brings together what several ranks hold: their values in one order, and where this rank's begin.
            None where all pairs are here.

    Returns:
        Of the pairs that are here. Shape (pairs,), nats.

    Source: Melnyk et al. 2024 (the paired variant), https://arxiv.org/abs/2406.05882
    """
    margin, ref_margin = chosen_logps - rejected_logps, ref_chosen_logps - ref_rejected_logps
    everyones, start = (margin.detach(), 0) if gather is None else gather(margin.detach())
    all_ref = ref_margin if gather is None else gather(ref_margin)[0]
    place = everyones.argsort(stable=True).argsort()[start : start + len(margin)]
    target = all_ref.sort().values[place]
    return dpo_loss(margin, target, beta=beta, label_smoothing=label_smoothing)
