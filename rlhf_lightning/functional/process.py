"""Process reward models: a probability for each step of a solution, what the whole is worth, and where it first goes wrong.

Tables have one row a solution and one column a token; a mask says at which tokens a step is scored.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.functional.masked import last_true, masked_sum

Aggregation = Literal["product", "minimum", "last", "mean"]


def step_bce_loss(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Binary cross-entropy of each step; a softmax over the two classes right and wrong is the same with one logit less.

    .. math:: \ell = -\left[y \log \sigma(z) + (1 - y) \log \sigma(-z)\right]

    Args:
        logits: z, log-odds that the step is right. Shape (steps,), float32.
        labels: y in [0, 1]: whether it is, or the share of continuations from it that reach the right answer. Same shape.

    Returns:
        Shape (steps,), nats; at least the entropy of y.

    Source: Lightman et al. 2023, section 2.6, https://arxiv.org/abs/2305.20050; soft labels: Wang et al. 2023, eq. 3,
    https://arxiv.org/abs/2312.08935
    """
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def aggregate_steps(logits: Tensor, mask: Tensor, how: Aggregation) -> Tensor:
    r"""The log-probability of a solution from the logits of its steps.

    .. math:: \log \prod_k p_k, \quad \log \min_k p_k, \quad \log p_K, \quad \log \tfrac{1}{K} \sum_k p_k

    The product is the probability that every step is right, and falls with their number.

    Args:
        logits: Shape (batch, length), float32; what stands outside the mask has no effect.
        mask: True where a step is scored. Same shape, bool.
        how: Which of the four.

    Returns:
        Shape (batch,), nats, at most 0.

    Raises:
        ValueError: If a row has no step.

    Source: Lightman et al. 2023, section 2.6 and appendix F, https://arxiv.org/abs/2305.20050
    """
    last = last_true(mask)
    logps = F.logsigmoid(torch.where(mask, logits, 0))
    if how == "product":
        return masked_sum(logps, mask, dim=1)
    if how == "minimum":
        return logps.masked_fill(~mask, torch.inf).min(dim=1).values
    if how == "last":
        return logps.gather(1, last[:, None]).squeeze(1)
    return logps.masked_fill(~mask, -torch.inf).logsumexp(dim=1) - mask.sum(dim=1).log()


def first_true(mask: Tensor) -> Tensor:
    """Column of the first True in each row, the number of columns where there is none. Shape (batch,), int64."""
    length = mask.shape[1]
    return torch.where(mask, torch.arange(length, device=mask.device), length).amin(dim=1)


def first_errors(logits: Tensor, labels: Tensor, mask: Tensor, *, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """Whether the first step that is held for wrong is the first that is wrong, and none where none is.

    Args:
        logits: Of the steps. Shape (batch, length), float32.
        labels: Probability that the step is right; below 1/2 it is wrong. Same shape.
        mask: True where a step is labelled. Same shape, bool.
        threshold: A step is held for wrong below this probability.

    Returns:
        Found, and which solutions have an error. Shape (batch,), bool, each.

    Source: Zheng et al. 2024 (ProcessBench), section 3, https://arxiv.org/abs/2412.06559
    """
    wrong = first_true(mask & (labels < 0.5))
    held_wrong = first_true(mask & (torch.where(mask, logits, 0).sigmoid() < threshold))
    return held_wrong == wrong, wrong < mask.shape[1]


def first_error_f1(on_erroneous: Tensor, on_correct: Tensor) -> Tensor:
    """Harmonic mean of the accuracies on solutions with an error and without: neither class can be given up for the other.

    Args:
        on_erroneous: Share of the erroneous solutions whose first error was found. Scalar in [0, 1].
        on_correct: Share of the others in which no error was found. Scalar in [0, 1].

    Source: Zheng et al. 2024 (ProcessBench), section 3, https://arxiv.org/abs/2412.06559
    """
    both = on_erroneous + on_correct
    return torch.where(both > 0, 2 * on_erroneous * on_correct / both, 0)
