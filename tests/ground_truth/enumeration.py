"""What turns a module's own step into an expectation over all responses."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf_lightning.evaluation.gradients import all_responses, exact_values, perturb
from rlhf_lightning.generation.engine import Generation
from rlhf_lightning.modules import DPOModule, OnlineDPOModule, PPOModule, RewardModelModule, SFTModule
from rlhf_lightning.rollouts.advantages import AdvantageEstimator
from rlhf_lightning.worlds import EnumerableWorld

NOISE = 0.05


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients it is given and leaves the weights alone."""

    def __init__(self, params):
        super().__init__(params, lr=0.0)

    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        self.seen = {
            id(p): p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None
        }
        return loss


@dataclass(frozen=True)
class Enumerated(AdvantageEstimator):
    """An estimator's advantages, each weighted by the probability of its response: a rollout then is the expectation.

    A rollout that was sampled holds each response in proportion to its probability; the one here holds each once.
    """

    inner: AdvantageEstimator
    prompts: int
    rewards: Tensor | None = None  # given, the critic's values are replaced by the true ones

    def estimate(self, rollout, *, kl_coef, all_sum):
        if self.rewards is not None:
            rollout = replace(rollout, values=exact_values(rollout, self.rewards, kl_coef=kl_coef))
        done = self.inner.estimate(rollout, kl_coef=kl_coef, all_sum=all_sum)
        p = rollout.logprobs.sum(1, keepdim=True).exp() / self.prompts
        return done.with_advantages(p * done.advantages, done.returns)


class _Perturbed:
    """Moves the policy away from the reference once it is built."""

    def configure_model(self):
        built = trained(self) is not None
        super().configure_model()
        if not built:
            perturb(trained(self), NOISE)


class PerturbedPPO(_Perturbed, PPOModule):
    """Collects every response once instead of sampling; all that follows is the module's own code."""

    world: EnumerableWorld

    def _generate(self, batch, sampling):
        return all_responses(self.world)


class PerturbedOnlineDPO(_Perturbed, OnlineDPOModule):
    """Draws every group of two once, in place of sampling; each counts as often as the policy would draw it."""

    world: EnumerableWorld

    def _generate(self, batch, sampling):
        every, count = all_responses(self.world), len(self.world.responses)
        first, second = torch.combinations(torch.arange(count), 2, with_replacement=True).T
        self.first = torch.cat([first + count * prompt for prompt in range(len(self.world.prompts))])
        self.second = torch.cat([second + count * prompt for prompt in range(len(self.world.prompts))])
        rows = torch.stack([self.first, self.second], dim=1).flatten()
        tensors = ("input_ids", "attention_mask", "sequence_mask", "response_mask", "truncated")
        drawn = Generation(every.drawn.tokens[rows])
        chosen = {name: getattr(every, name)[rows] for name in tensors}
        return replace(every, **chosen, drawn=drawn, samples=every.samples.rows(rows.tolist()))

    def _paired(self, rollout):
        pairs = super()._paired(rollout)
        p = rollout.logprobs.sum(1).exp().view(-1, 2).prod(1)  # off the response they are zero
        weight = torch.where(self.first == self.second, p, 2 * p) * len(p)  # in both orders
        return pairs.with_advantages(pairs.advantages * weight.repeat_interleave(2)[:, None], pairs.returns)


class PerturbedDPO(_Perturbed, DPOModule):
    pass


class PerturbedSFT(_Perturbed, SFTModule):
    pass


class PerturbedRewardModel(_Perturbed, RewardModelModule):
    pass


def trained(module):
    """The transformers network that a module trains; None before it is built."""
    if isinstance(module, PPOModule):
        return module.actor_critic and module.actor_critic.policy.network
    owner = module.network if isinstance(module, RewardModelModule) else module.policy
    return owner and owner.network


def as_vector(seen, network):
    """Recorded gradients of a network's weights as one vector, float64."""
    zeros = {id(p): torch.zeros_like(p) for p in network.parameters()}
    return torch.cat([(zeros | seen)[id(p)].flatten() for p in network.parameters()]).double()


def exact_gradient(value, network):
    """Gradient of a scalar as one vector, float64."""
    found = torch.autograd.grad(value, list(network.parameters()), allow_unused=True)
    pairs = zip(found, network.parameters(), strict=True)
    return torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in pairs]).double()


def relative_error(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


def direction_error(found, exact):
    """The same with lengths taken out: what it is divided by is a convention."""
    return relative_error(found / found.norm(), exact / exact.norm())
