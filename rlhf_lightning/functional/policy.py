"""The clipped surrogate of PPO, per token; the reduction is the caller's."""

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
