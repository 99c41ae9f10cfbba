"""What each method does to a policy when every expectation is exact: losses for :class:`.tabular.Descent`.

The gradient of each is the method's expected on-policy update, or that of its population loss over pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf_lightning.evaluation.tabular import Loss, Problem, Standing
from rlhf_lightning.functional.advantages import gae
from rlhf_lightning.functional.kl import kl_k1, kl_k2, kl_k3
from rlhf_lightning.functional.optimum import exact_kl, objective
from rlhf_lightning.functional.rewards import token_rewards
from rlhf_lightning.functional.unpaired import kto_baseline, kto_loss
from rlhf_lightning.losses import PPOLoss

PairLoss = Callable[[Tensor, Tensor], Tensor]
EPSILON = 1e-4  # beside GRPO's standard deviation


# ---------------------------------------------------------------- reinforcement learning


def exact_gradient(at: Standing) -> Tensor:
    """Of J itself."""
    return -objective(at.logps.sum(dim=2), at.ref_logps.sum(dim=2), at.rewards, beta=at.beta).sum()


def k1_in_reward(at: Standing) -> Tensor:
    """REINFORCE, RLOO and the first step of PPO, by PPO's own formulas: a penalty on every token, what follows is summed."""
    logps, ref_logps = (x.flatten(0, 1) for x in (at.logps, at.ref_logps))
    old, mask = logps.detach(), torch.ones_like(logps, dtype=torch.bool)
    rewards = token_rewards(at.rewards.flatten(), old, ref_logps, mask, kl_coef=at.beta)
    advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, gae_lambda=1.0)
    weighted = at.probabilities.view(-1, 1) * advantages
    return PPOLoss().policy(logps, old, weighted, mask)[0]


def in_reward(kl: Callable[[Tensor], Tensor]) -> Loss:
    """Another estimator of the KL in the same place."""

    def loss(at: Standing) -> Tensor:
        return reinforced(at, at.rewards - at.beta * kl(at.token_ratios.detach()).sum(dim=2))

    return loss


def in_loss(kl: Callable[[Standing], Tensor], normalised: bool = False) -> Loss:
    """An estimator of the KL beside the policy's loss, with its own gradient.

    Args:
        kl: Of each response. Shape (prompts, responses), with gradient.
        normalised: Whether rewards are divided by their standard deviation under the policy, as GRPO does.
    """

    def loss(at: Standing) -> Tensor:
        advantages = standardised(at) if normalised else at.rewards
        return reinforced(at, advantages) + at.beta * (at.probabilities * kl(at)).sum()

    return loss


def grpo_with_exact_kl(at: Standing) -> Tensor:
    """Standardised rewards and the KL itself."""
    kl = exact_kl(at.logps.sum(dim=2), at.ref_logps.sum(dim=2)).sum()
    return reinforced(at, standardised(at)) + at.beta * kl


def reinforced(at: Standing, advantages: Tensor) -> Tensor:
    """The policy gradient's surrogate, exact; a baseline changes nothing in it."""
    centred = advantages - (at.probabilities * advantages).sum(dim=1, keepdim=True)
    return -(at.probabilities * centred * at.logps.sum(dim=2)).sum()


def standardised(at: Standing) -> Tensor:
    """Rewards less their mean under the policy, over their standard deviation under it. Shape (prompts, responses)."""
    p = at.probabilities
    centred = at.rewards - (p * at.rewards).sum(dim=1, keepdim=True)
    return centred / ((p * centred.square()).sum(dim=1, keepdim=True).sqrt() + EPSILON)


def of_tokens(estimator: Callable[[Tensor], Tensor], weighted: bool = False) -> Callable[[Standing], Tensor]:
    """The sum over a response's tokens; ``weighted`` by the ratio to the sampling policy, which is 1 but has a gradient."""

    def kl(at: Standing) -> Tensor:
        rho = (at.logps - at.logps.detach()).exp() if weighted else 1.0
        return (rho * estimator(at.token_ratios)).sum(dim=2)

    return kl


def of_sequences(estimator: Callable[[Tensor], Tensor], weighted: bool = False) -> Callable[[Standing], Tensor]:
    """The same of the whole response at once."""

    def kl(at: Standing) -> Tensor:
        logps = at.logps.sum(dim=2)
        rho = (logps - logps.detach()).exp() if weighted else 1.0
        return rho * estimator(at.ratios)

    return kl


REINFORCEMENT: dict[str, Loss] = {
    "exact gradient": exact_gradient,
    "k1 in the reward": k1_in_reward,
    "k2 in the loss, of sequences": in_loss(of_sequences(kl_k2)),
    "weighted k3 in the loss, of sequences": in_loss(of_sequences(kl_k3, weighted=True)),
    "k2 in the loss, of tokens": in_loss(of_tokens(kl_k2)),
    "weighted k3 in the loss, of tokens": in_loss(of_tokens(kl_k3, weighted=True)),
    "k3 in the loss, of tokens": in_loss(of_tokens(kl_k3)),
    "k1 in the loss": in_loss(of_tokens(kl_k1)),
    "k2 in the reward": in_reward(kl_k2),
    "k3 in the reward": in_reward(kl_k3),
    "GRPO: standardised, k3 of tokens": in_loss(of_tokens(kl_k3), normalised=True),
    "GRPO: standardised, exact KL": grpo_with_exact_kl,
}


# ---------------------------------------------------------------- preferences


@dataclass(frozen=True)
class Pairs:
    """How pairs come about: both responses drawn from ``rivals``, Bradley-Terry labels, of which a share is flipped.

    Attributes:
        rivals: What both are drawn from.
        flipped: Share of the labels that say the opposite, in [0, 1/2).
    """

    rivals: Literal["reference", "uniform"] = "reference"
    flipped: float = 0.0

    def weights(self, problem: Problem) -> Tensor:
        """How often each ordered pair comes; sums to 1 for each prompt. Shape (prompts, chosen, rejected)."""
        ref_logits, rewards = problem.draw()
        drawn = problem.token_logps(ref_logits).sum(dim=2).exp()
        if self.rivals == "uniform":
            drawn = torch.full_like(drawn, 1 / drawn.shape[1])
        wins = torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])
        weights = drawn[:, :, None] * drawn[:, None, :] * ((1 - self.flipped) * wins + self.flipped * (1 - wins))
        return weights / weights.sum(dim=(1, 2), keepdim=True)


def over_pairs(weights: Tensor, pair: PairLoss, reference_free: bool = False) -> Loss:
    """The mean of a pair loss over all ordered pairs.

    Args:
        weights: Of :class:`Pairs`.
        pair: Of log-ratios, chosen and rejected; of mean log-probabilities where it knows no reference.
        reference_free: Whether it does not.
    """

    def loss(at: Standing) -> Tensor:
        x = at.logps.mean(dim=2) if reference_free else at.ratios
        return (weights * pair(x[:, :, None].expand_as(weights), x[:, None, :].expand_as(weights))).sum()

    return loss


def over_halves(weights: Tensor, rows: Callable[[Standing, Tensor, Tensor], Tensor]) -> Loss:
    """The mean of a loss on single responses, each pair taken apart.

    Args:
        weights: Of :class:`Pairs`.
        rows: Of where the policy stands, and how often each response is liked and disliked, (prompts, responses) each.
    """
    liked, disliked = weights.sum(dim=2), weights.sum(dim=1)
    return lambda at: rows(at, liked, disliked)


def kto(at: Standing, liked: Tensor, disliked: Tensor) -> Tensor:
    """KTO whose reference point is the KL itself, prompt by prompt."""
    kl = exact_kl(at.logps.sum(dim=2), at.ref_logps.sum(dim=2))
    z0 = torch.stack([kto_baseline(of_prompt[None]) for of_prompt in kl])[:, None]
    yes = torch.ones_like(liked, dtype=torch.bool)
    good, bad = (kto_loss(at.ratios, which, z0, beta=at.beta) for which in (yes, ~yes))
    return (liked * good + disliked * bad).sum()
