"""Single-sample estimators of KL(policy || reference), and what each may be used for.

With d = log pi(y) - log ref(y) and y sampled from pi. A good *value* estimator need not have a good *gradient*:

* ``k1`` in the reward gives exactly the gradient of the KL: the default of PPO here. In the loss its gradient is zero.
* ``k2`` in the loss, on sequence log-ratios, gives exactly that gradient too; as a value it is biased.
* ``k3`` is the best value to *report*: unbiased, never negative. In the reward it is wrong, in the loss it is another
  objective (the forward KL).

Source: Schulman, http://joschu.net/blog/kl-approx.html; for the gradients Tang and Munos 2025, arXiv 2506.09477.
"""

import torch
from torch import Tensor

_LIMIT = 40.0  # exp(40) is far beyond any sane ratio and still finite in float32


def kl_k1(log_ratio: Tensor) -> Tensor:
    """k1 = d: unbiased, of either sign.

    Args:
        log_ratio: log policy - log reference. Any shape, nats.

    Returns:
        Same shape, nats.
    """
    return log_ratio


def kl_k2(log_ratio: Tensor) -> Tensor:
    """k2 = d^2 / 2: biased, low variance; half the squared log-ratio. Shapes as in :func:`kl_k1`."""
    return 0.5 * log_ratio.square()


def kl_k3(log_ratio: Tensor) -> Tensor:
    """k3 = exp(-d) - 1 + d: unbiased and never negative. Shapes as in :func:`kl_k1`.

    Through ``expm1``, for in float32 the plain form is negative at small d.
    """
    d = log_ratio.clamp(min=-_LIMIT)
    return torch.expm1(-d) + d
