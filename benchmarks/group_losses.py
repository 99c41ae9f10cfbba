"""GRPO and RLOO as the two loops by hand have them: over the tokens of all responses, one after the other."""

import torch
from torch import Tensor

from benchmarks.problem import KL_COEF, Spec


def sums(x: Tensor, lengths: Tensor) -> Tensor:
    """Of each response's tokens. Shape (responses,)."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return torch.zeros(len(lengths)).index_add(0, row, x)


def advantages(spec: Spec, scores: Tensor, kl: Tensor) -> Tensor:
    """Of each response, beside the others of its prompt: RLOO's with the KL in the reward, GRPO's in units of a deviation."""
    if spec.method == "rloo":
        rewards = (scores - KL_COEF * kl).view(-1, spec.shape.group)
        others = (rewards.sum(1, keepdim=True) - rewards) / (spec.shape.group - 1)
        return (rewards - others).flatten()
    rewards = scores.view(-1, spec.shape.group)
    centred = rewards - rewards.mean(1, keepdim=True)
    return (centred / (rewards.std(1, keepdim=True) + 1e-4)).flatten()


def loss(spec: Spec, logprobs: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, lengths: Tensor) -> Tensor:
    """RLOO's with one ratio a response, GRPO's with one a token and k3 beside it; means over responses."""
    if spec.method == "rloo":
        return clipped(sums(logprobs - old, lengths).exp(), advantages).mean()
    gap = ref - logprobs
    tokens = clipped((logprobs - old).exp(), torch.repeat_interleave(advantages, lengths))
    return (sums(tokens + KL_COEF * (gap.exp() - gap - 1), lengths) / lengths).mean()


def clipped(ratio: Tensor, advantages: Tensor) -> Tensor:
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
