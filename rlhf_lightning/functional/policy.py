"""The clipped surrogate of PPO, per token, and the weights that correct for another sampler; the reduction is the caller's."""

import torch
from torch import Tensor


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_range: float
) -> tuple[Tensor, Tensor]:
    r"""PPO's pessimistic surrogate.

    .. math:: \ell_t = -\min(\rho_t A_t, \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) A_t), \quad
        \rho_t = \pi_\theta(y_t) / \pi_{old}(y_t)

    Args:
        logprobs: Of the policy being trained. Shape (batch, length), nats.
        old_logprobs: Of the policy that sampled, at the same temperature. Same shape.
        advantages: Same shape.
        mask: True on response tokens. Same shape, bool.
        clip_range: epsilon, in (0, 1).

    Returns:
        The loss of each token, and whether the clip decided it (bool, detached); zero and False where masked.

    Source: Schulman et al. 2017, eq. 7, https://arxiv.org/abs/1707.06347
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0)
    ratio = log_ratio.exp()
    advantages = advantages.masked_fill(~mask, 0)
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(free, clipped).masked_fill(~mask, 0), (clipped > free).detach() & mask


def importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, *, cap: float) -> Tensor:
    r"""Truncated importance weights of the policy over a sampler whose numbers are a little different.

    .. math:: w_t = \min\left(\frac{\pi(y_t)}{\mu(y_t)}, C\right)

    Args:
        logprobs: Of the policy, with the weights that sampled. Shape (batch, length), nats.
        sampler_logprobs: Of the engine that sampled, :math:`\mu`, at the same temperature. Same shape.
        mask: True on response tokens. Same shape, bool.
        cap: C, > 0: bounds the variance, at the price of a bias where the two are far apart.

    Returns:
        Same shape, in (0, C]; 1 where masked.

    Source: Ionides 2008 (truncated importance sampling); for inference engines Yao et al. 2025, "Your efficient RL
        framework secretly brings you off-policy training".
    """
    return (logprobs - sampler_logprobs).masked_fill(~mask, 0).exp().clamp(max=cap).masked_fill(~mask, 1)
