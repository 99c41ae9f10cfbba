"""What is made of the tokens of two responses before a loss is put on them."""

import torch
from torch import Tensor

from rlhf_lightning.functional.masked import masked_sum


def mean_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Mean log-probability of a token of each response, EOS included.

    Args:
        logprobs: Per token. Shape (rows, length), nats.
        mask: True on response tokens, on one of each row at least. Same shape, bool.

    Returns:
        Shape (rows,).
    """
    return masked_sum(logprobs, mask, dim=1) / mask.sum(1)


def desensitised_logprobs(logprobs: Tensor, mask: Tensor, common: Tensor, *, alpha: float) -> Tensor:
    r"""Log-probability of each response of which the tokens beyond the length of its twin count less.

    .. math:: \sum_{t \le l_p} \log\pi(y_t) + \alpha \sum_{t > l_p} \log\pi(y_t) \qquad l_p = \min(|y_w|, |y_l|)

    Args:
        logprobs: Per token. Shape (rows, length), nats.
        mask: True on response tokens. Same shape, bool.
        common: Length of the shorter response of each row's pair. Shape (rows,).
        alpha: Weight of the tokens beyond, in [0, 1].

    Returns:
        Shape (rows,).

    Source: Liu et al. 2024, https://arxiv.org/abs/2409.06411
    """
    beyond = mask & (mask.cumsum(1) > common[:, None])
    return masked_sum(logprobs, mask & ~beyond, dim=1) + alpha * masked_sum(logprobs, beyond, dim=1)


def on_policy_weights(logprobs: Tensor, collisions: Tensor, mask: Tensor) -> Tensor:
    r"""How much each response looks like one of the policy's own, whatever its length; 1 for a typical one.

    .. math:: w = \exp \frac{1}{|y|} \sum_t \left( \log\pi(y_t) - \log \sum_v \pi(v)^2 \right)

    Args:
        logprobs: Per token. Shape (rows, length), nats.
        collisions: Log of the sum of squared probabilities of each token's distribution. Same shape, nats.
        mask: True on response tokens. Same shape, bool.

    Returns:
        Shape (rows,), without gradient.

    Source: Zhou et al. 2024, eq. 2 with the sampled alignment of sec. 3.2, https://arxiv.org/abs/2406.11827
    """
    return torch.exp(mean_logprobs(logprobs - collisions, mask)).detach()
