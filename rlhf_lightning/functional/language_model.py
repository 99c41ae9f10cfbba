"""The loss of supervised fine-tuning."""

from torch import Tensor

from rlhf_lightning.functional.masked import masked_sum


def nll_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    r"""Negative log-likelihood summed over each sequence's supervised tokens.

    .. math:: \ell_b = -\sum_t m_{b,t} \log \pi(y_{b,t} \mid y_{b,<t})

    Divide the sum over the optimizer step by the number of supervised tokens in it, over all micro-batches and ranks:
    that token mean is the SFT objective. The mean of micro-batch means is another number.

    Args:
        logprobs: Log-probability of each token. Shape (batch, length), float32.
        mask: True on supervised tokens. Shape (batch, length), bool.

    Returns:
        Shape (batch,), nats.

    Source: Ouyang et al. 2022, section 3.5, https://arxiv.org/abs/2203.02155
    """
    return -masked_sum(logprobs, mask, dim=1)
