"""Policy-gradient losses per token, and the weights that correct for another sampler; the reduction is the caller's.

Advantages are constants, log-probabilities those of one temperature. ``low`` and ``high`` tell where a bound took a token's
gradient away: the ratio had fallen below it with a negative advantage, or risen above it with a positive one.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.functional.masked import masked_sum

Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
_LIMIT = 40.0  # of a log-ratio: exp(40) is far beyond any sane ratio and still finite in float32


class TokenLoss(NamedTuple):
    """A loss of each token; every field is zero or False where masked.

    Attributes:
        loss: Shape (batch, length).
        low: The lower bound decided. Same shape, bool, detached.
        high: The upper bound decided. Same shape, bool, detached.
    """

    loss: Tensor
    low: Tensor
    high: Tensor


def reinforce_loss(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
    r"""REINFORCE, with nothing that bounds it: right for one step on fresh responses.

    .. math:: \ell_t = -A_t \log\pi_\theta(y_t)

    Args:
        logprobs: Of the policy being trained. Shape (batch, length), nats.
        advantages: Same shape.
        mask: True on response tokens. Same shape, bool.

    Source: Williams 1992; for language models Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740
    """
    loss = (-advantages.masked_fill(~mask, 0) * logprobs.masked_fill(~mask, 0)).masked_fill(~mask, 0)
    return TokenLoss(loss, torch.zeros_like(mask), torch.zeros_like(mask))


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    ratio_cap: float | None = None,
) -> TokenLoss:
    r"""PPO's pessimistic surrogate; with unlike bounds DAPO's clip-higher; with a cap dual-clip PPO, or two-sided GRPO.

    .. math:: \ell_t = -\min(\rho_t A_t, \mathrm{clip}(\rho_t, 1-\epsilon_l, 1+\epsilon_h) A_t), \quad
        \rho_t = \pi_\theta(y_t) / \pi_{old}(y_t)

    where a negative advantage meets the ratio :math:`\min(\rho_t, c)`: without c nothing bounds what one bad token can do.

    Args:
        logprobs: Of the policy being trained. Shape (batch, length), nats.
        old_logprobs: Of the policy that sampled, at the same temperature. Same shape.
        advantages: Same shape.
        mask: True on response tokens. Same shape, bool.
        clip_low: epsilon_l, in (0, 1).
        clip_high: epsilon_h, > 0.
        ratio_cap: c, > 1 + epsilon_h; None for no bound.

    Source: Schulman et al. 2017, eq. 7, https://arxiv.org/abs/1707.06347; dual clip: Ye et al. 2019, eq. 6,
    https://arxiv.org/abs/1912.09729; clip-higher: Yu et al. 2025, eq. 8, https://arxiv.org/abs/2503.14476; two-sided:
    INTELLECT-2, 2025, https://arxiv.org/abs/2505.07291
    """
    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0).exp()
    return _clipped(ratio, advantages, mask, clip_low, clip_high, ratio_cap)


def clipped_sequence_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    length_normalised: bool,
) -> TokenLoss:
    r"""The clipped surrogate with one ratio a response: GSPO's, the geometric mean over its tokens, or the plain product.

    .. math:: s_i = \exp\left(\frac{1}{|y_i|} \sum_t \log\rho_{i,t}\right), \quad
        \ell_{i,t} = -\min(s_i A_{i,t}, \mathrm{clip}(s_i, 1-\epsilon_l, 1+\epsilon_h) A_{i,t})

    To be aggregated as ``sequence_mean``, which gives each response the loss of its ratio.

    Args:
        logprobs: Of the policy being trained. Shape (batch, length), nats.
        old_logprobs: Of the policy that sampled. Same shape.
        advantages: Same shape.
        mask: True on response tokens. Same shape, bool.
        clip_low: epsilon_l, in (0, 1); GSPO's is 3e-4, for a geometric mean hardly moves.
        clip_high: epsilon_h, > 0.
        length_normalised: False for the product of the ratios: exact, and of a variance that grows with the length.

    Source: Zheng et al. 2025, eq. 5 and 7, https://arxiv.org/abs/2507.18071
    """
    log_ratio = masked_sum(logprobs - old_logprobs, mask, dim=1)
    if length_normalised:
        log_ratio = log_ratio / mask.sum(dim=1).clamp(min=1)
    ratio = log_ratio.clamp(max=_LIMIT).exp()[:, None].expand(mask.shape)
    return _clipped(ratio, advantages, mask, clip_low, clip_high, None)


def _clipped(
    ratio: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float, ratio_cap: float | None
) -> TokenLoss:
    advantages = advantages.masked_fill(~mask, 0)
    free = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(free, bounded)
    decided = bounded > free
    if ratio_cap is not None:
        most = -advantages * ratio_cap
        capped = (advantages < 0) & (loss > most)
        loss, decided = torch.where(capped, most, loss), decided | capped
    decided = decided.detach() & mask
    below = ratio.detach() < 1 - clip_low
    return TokenLoss(loss.masked_fill(~mask, 0), decided & below, decided & ~below)


def cispo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, ratio_cap: float
) -> TokenLoss:
    r"""CISPO: the importance weight is bounded, and no token's gradient is ever taken away.

    .. math:: \ell_t = -\mathrm{sg}(\min(\rho_t, c)) \, A_t \log\pi_\theta(y_t)

    Args:
        logprobs: Of the policy being trained. Shape (batch, length), nats.
        old_logprobs: Of the policy that sampled. Same shape.
        advantages: Same shape.
        mask: True on response tokens. Same shape, bool.
        ratio_cap: c, the greatest weight itself (not one plus something), > 0; ``high`` tells where it holds.

    Source: MiniMax 2025, eq. 4, https://arxiv.org/abs/2506.13585
    """
    ratio = (logprobs - old_logprobs).detach().masked_fill(~mask, 0).exp()
    loss = -ratio.clamp(max=ratio_cap) * advantages.masked_fill(~mask, 0) * logprobs.masked_fill(~mask, 0)
    return TokenLoss(loss.masked_fill(~mask, 0), torch.zeros_like(mask), (ratio > ratio_cap) & mask)


def importance_weights(
    logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, *, cap: float, how: Correction
) -> Tensor:
    r"""Importance weights of the policy over a sampler whose numbers are a little different, bounded.

    .. math:: w_t = \frac{\pi(y_t)}{\mu(y_t)} \quad\text{or}\quad w_i = \prod_t w_{i,t}

    "token_truncate" and "sequence_truncate" take the smaller of the weight and the cap, "token_mask" and "sequence_mask" leave
    out what exceeds it. Only the whole response's weight, unbounded, is without bias.

    Args:
        logprobs: Of the policy, with the weights that sampled. Shape (batch, length), nats.
        sampler_logprobs: Of the engine that sampled, :math:`\mu`, at the same temperature. Same shape.
        mask: True on response tokens. Same shape, bool.
        cap: > 0: bounds the variance, at the price of a bias where the two are far apart.
        how: Which.

    Returns:
        Same shape, in [0, cap]; 1 where masked.

    Source: Ionides 2008 (truncated importance sampling); for inference engines Yao et al. 2025, "Your efficient RL
        framework secretly brings you off-policy training".
    """
    log_weights = (logprobs - sampler_logprobs).masked_fill(~mask, 0)
    if how.startswith("sequence"):
        log_weights = log_weights.sum(dim=1, keepdim=True).expand(mask.shape)
    weights = log_weights.clamp(max=_LIMIT).exp()
    bounded = weights.clamp(max=cap) if how.endswith("truncate") else weights.masked_fill(weights > cap, 0)
    return bounded.masked_fill(~mask, 1)
