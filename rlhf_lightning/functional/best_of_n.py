"""Choosing among samples by their rewards: the best of n, rejection, weights; and what is known of the outcome beforehand."""

import math

import torch
from torch import Tensor


def best_of_n_kl(n: int) -> float:
    r"""The KL divergence of the best of n from the policy, :math:`\log n - (n-1)/n`: a bound, reached where no two rewards tie.

    Source: Beirami et al. 2024, theorem 1, https://arxiv.org/abs/2401.01879
    """
    return math.log(n) - (n - 1) / n


def best_of_n_win_rate(n: int) -> float:
    r"""How often the best of n has a higher reward than one sample, :math:`n/(n+1)`: a bound, reached where no two tie.

    Source: Gao et al. 2022, section 2.1, https://arxiv.org/abs/2210.10760
    """
    return n / (n + 1)


def best_of_n_logps(ref_logps: Tensor, rewards: Tensor, n: int) -> Tensor:
    r"""The distribution of the best of n samples, over responses that can be written down.

    .. math:: P(\text{the best is worth } r) = F(r)^n - F(r^-)^n

    F is the distribution function of the reward under the policy. Responses of one reward share this mass in proportion to
    their own probability, which is what choosing at random among the best ones does.

    Args:
        ref_logps: Log-probabilities of the policy. Shape (prompts, responses), float64, nats.
        rewards: Shape (prompts, responses).
        n: Samples, >= 1.

    Returns:
        Log-probabilities, same shape.

    Source: Beirami et al. 2024, lemma 1, https://arxiv.org/abs/2401.01879
    """
    p = ref_logps.exp()
    below = (rewards[:, None, :] < rewards[:, :, None]).to(p.dtype) @ p[:, :, None]
    tied = (rewards[:, None, :] == rewards[:, :, None]).to(p.dtype) @ p[:, :, None]
    mass = (below + tied).clamp(max=1) ** n - below**n
    return (mass / tied).squeeze(-1).log() + ref_logps


def best_of_n_means(scores: Tensor, values: Tensor, n: int) -> Tensor:
    r"""What the best of n samples is worth in the mean, from N >= n samples: over all subsets of n, without drawing any.

    .. math:: \sum_{i=n}^{N} \frac{\binom{i-1}{n-1}}{\binom{N}{n}} v_{(i)}

    The values stand in ascending order of the scores. It is unbiased for each n. Samples of one score are chosen among at
    random, so each counts with the mean of all of them.

    Args:
        scores: What is chosen by. Shape (prompts, N), floating point.
        values: What the chosen sample is worth; the scores themselves, or another reward. Same shape.
        n: Size of the subsets, from 1 to N.

    Returns:
        Shape (prompts,), float64.

    Source: Nakano et al. 2021, appendix I, https://arxiv.org/abs/2112.09332
    """
    total = scores.shape[1]
    if not 1 <= n <= total:
        raise ValueError(f"the best of {n} can't be known from {total} samples a prompt")
    shares = [math.comb(i - 1, n - 1) / math.comb(total, n) for i in range(1, total + 1)]
    ordered, order = scores.sort(dim=1)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = begins.long().cumsum(dim=1) - 1  # number of the score among the distinct ones of its row
    sums, counts = (torch.zeros(scores.shape, dtype=torch.float64) for _ in range(2))
    values = values.double().gather(1, order)
    sums.scatter_add_(1, group, values)
    counts.scatter_add_(1, group, torch.ones_like(values))
    return (sums / counts.clamp(min=1)).gather(1, group) @ torch.tensor(shares, dtype=torch.float64)


def exponential_weights(rewards: Tensor, *, beta: float) -> Tensor:
    r"""What samples of the reference policy weigh in reward-weighted regression.

    .. math:: w_i = \frac{e^{r_i / \beta}}{\sum_j e^{r_j / \beta}}

    The maximum of the weighted likelihood is :math:`\pi_{ref} e^{r/\beta} / Z` as the number of samples grows.

    Args:
        rewards: Of the samples of one prompt each row. Shape (..., samples).
        beta: The temperature, > 0.

    Returns:
        Same shape; each row sums to one.

    Source: Peters and Schaal 2007, https://doi.org/10.1145/1273496.1273590; Peng et al. 2019, https://arxiv.org/abs/1910.00177
    """
    return torch.softmax(rewards / beta, dim=-1)


def acceptance_probabilities(rewards: Tensor, *, beta: float, ceiling: float | None = None) -> Tensor:
    r"""How likely statistical rejection sampling keeps each sample.

    .. math:: P(\text{keep } i) = e^{(r_i - r_{max}) / \beta}

    What is kept is a sample of :math:`\pi_{ref} e^{r/\beta} / Z`: exactly if :math:`r_{max}` bounds every possible reward,
    nearly if it is the largest among many samples.

    Args:
        rewards: Of the samples of one prompt each row. Shape (..., samples).
        beta: The temperature, > 0.
        ceiling: The bound; None for the largest reward of the row.

    Returns:
        Same shape, in (0, 1].

    Source: Liu et al. 2023, section 3.2 and algorithm 1, https://arxiv.org/abs/2309.06657
    """
    top = rewards.amax(dim=-1, keepdim=True) if ceiling is None else ceiling
    return ((rewards - top) / beta).exp()
