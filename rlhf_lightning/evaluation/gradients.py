"""The expected update of a module's own code, by enumeration, beside the exact gradient: the sharpest test there is.

Convergence cannot see everything: every advantage vanishes at the optimum, so an update with wrong weights ends there too.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.evaluation.exact import Target, enumerated_rows, reward_share
from rlhf_lightning.functional.aggregation import counts
from rlhf_lightning.functional.optimum import objective
from rlhf_lightning.generation.engine import Generation
from rlhf_lightning.losses import DPOLoss, IPOLoss, PairLoss, PolicyObjective
from rlhf_lightning.losses.pairs import Needs, Pairs, ScoredResponses
from rlhf_lightning.modules import DPOModule, GRPOModule, PPOModule
from rlhf_lightning.modules.online import policy_alone
from rlhf_lightning.rewards.reward import Samples, checked_scores
from rlhf_lightning.rollouts.buffer import Rollout
from rlhf_lightning.rollouts.collect import Responses, score_responses
from rlhf_lightning.rollouts.group_advantages import LeaveOneOut
from rlhf_lightning.worlds import EnumerableWorld


@dataclass(frozen=True)
class Population(PairLoss):
    """A pair loss over *all* ordered pairs of responses to a prompt, each as often as it would be seen.

    Attributes:
        inner: The loss of a pair.
        weights: How often a pair is drawn and labelled so. Shape (prompts, chosen, rejected), float64.
    """

    inner: PairLoss
    weights: Tensor

    def pairs(self, pairs: Pairs) -> Tensor:
        """Each response's share in the mean loss, shape (pairs,), from every response in order, as chosen and as rejected."""
        prompts, responses, _ = self.weights.shape
        rows = torch.arange(prompts * responses, device=pairs.responses.mask.device).view(prompts, responses)
        chosen = rows[:, :, None].expand(self.weights.shape).flatten()
        rejected = rows[:, None, :].expand(self.weights.shape).flatten()
        loss = self.inner.pairs(pairs.rows(torch.cat([chosen, rejected + len(pairs)])))
        return (loss.view(self.weights.shape) * self.weights).sum(dim=2).flatten()

    @property
    def reward_scale(self) -> float:
        return self.inner.reward_scale

    @property
    def needs(self) -> Needs:
        return self.inner.needs

    def rewards(self, responses: ScoredResponses) -> Tensor:
        return self.inner.rewards(responses)


def preference_weights(world: EnumerableWorld) -> Tensor:
    """How often each ordered pair is drawn from the reference and labelled so, summing to one; (prompts, chosen, rejected)."""
    p, r = world.ref_logps.exp(), world.rewards
    drawn = p[:, :, None] * p[:, None, :]
    weights = drawn * torch.sigmoid(r[:, :, None] - r[:, None, :])
    return weights / weights.sum()


def population_batch(world: EnumerableWorld) -> PreferenceBatch:
    """Every response of every prompt, once as chosen and once as rejected: what a :class:`Population` loss reads."""
    rows = enumerated_rows(world, int(world.tokenizer().pad_token_id))
    ids, attention, response = (x.repeat(2, 1) for x in rows)
    return PreferenceBatch(ids, attention, response, torch.zeros(len(ids) // 2), torch.tensor(1.0))


def all_responses(world: EnumerableWorld) -> Responses:
    """Every prompt with every response, as if they had been sampled."""
    ids, attention, response = enumerated_rows(world, int(world.tokenizer().pad_token_id))
    count, repeats = len(world.prompts), len(world.responses)
    samples = Samples(
        prompts=[prompt for prompt in world.prompts for _ in range(repeats)],
        completions=[world.text(y) for _ in range(count) for y in world.responses],
        completion_ids=[list(y) for _ in range(count) for y in world.responses],
        truncated=world.truncated.repeat(count).tolist(),
    )
    mask = response[:, len(world.prompt_ids[0]) :]
    drawn = Generation(ids[:, -mask.shape[1] :])
    return Responses(ids, attention, response, mask, world.truncated.repeat(count), drawn, samples)


def exact_values(rollout: Rollout, rewards: Tensor, *, kl_coef: float) -> Tensor:
    """The value of each prefix under the policy that sampled: the expected reward from there on, less the KL to come.

    Args:
        rollout: Every response of every prompt.
        rewards: Of each response to each prompt. Shape (prompts, responses).
        kl_coef: Weight of the KL.

    Returns:
        Shape (prompts * responses, longest response), before each token; zero off the response.
    """
    p = rollout.logprobs.double().sum(dim=1).exp()
    penalties = kl_coef * (rollout.logprobs - rollout.ref_logprobs).double()
    to_go = rewards.flatten()[:, None] - penalties.flip(1).cumsum(1).flip(1)
    values = torch.zeros_like(to_go)
    start = rollout.input_ids.shape[1] - to_go.shape[1]
    for t in range(to_go.shape[1]):
        _, group = rollout.input_ids[:, : start + t].unique(dim=0, return_inverse=True)
        counts = p * rollout.response_mask[:, t]  # of the rows with these first tokens, those that go on
        total, mass = (torch.zeros(int(group.max()) + 1, dtype=p.dtype) for _ in range(2))
        total.index_add_(0, group, counts * to_go[:, t])
        mass.index_add_(0, group, counts)
        values[:, t] = (total / mass)[group]
    return values.masked_fill(~rollout.response_mask, 0).to(rollout.values.dtype)


def ppo_update(module: PPOModule, world: EnumerableWorld, rewards: Tensor, critic: str = "exact") -> Tensor:
    """The loss whose gradient is the expected first update of PPO: collect, estimate, learn, each with the module's own code.

    A sampled rollout holds a response in proportion to its probability. This one holds each once; as the loss of a first
    minibatch is linear in the advantages, those are weighted by the probability instead.

    Args:
        module: Configured.
        world: Where its prompts come from.
        rewards: Shape (prompts, responses).
        critic: "exact" gives the true value function; "own" keeps the module's, which biases any lambda below 1.
    """
    assert module.actor_critic is not None
    rollout = score_responses(
        all_responses(world),
        module.actor_critic,
        module.reference,
        checked_scores(module.reward, all_responses(world).samples),
        temperature=module.sampling.temperature,
        micro_batch_size=module.update.micro_batch_size,
    )
    if critic == "exact":
        rollout = replace(rollout, values=exact_values(rollout, rewards, kl_coef=module.kl.coef))
    rollout = module.advantages.estimate(rollout, kl_coef=module.kl.coef, all_sum=lambda x: x)
    p = rollout.logprobs.sum(dim=1, keepdim=True).exp() / len(world.prompts)
    loss, _ = module._micro_loss(rollout.with_advantages(p * rollout.advantages, rollout.returns))
    return loss


@dataclass(frozen=True)
class Expected(PolicyObjective):
    """An objective whose KL term, which no advantage carries, is weighted by the probability of each response as well.

    Attributes:
        inner: The objective.
        p: Shape (prompts * responses, 1).
    """

    inner: PolicyObjective | None = None
    p: Tensor | None = None

    def kl_tokens(self, log_ratio: Tensor, mask: Tensor) -> Tensor:
        assert self.inner is not None
        assert self.p is not None
        return self.p * self.inner.kl_tokens(log_ratio, mask)


def group_update(module: GRPOModule, world: EnumerableWorld) -> Tensor:
    """The loss whose gradient is the expected first update of a relative of GRPO, as in :func:`ppo_update`.

    All responses to a prompt are one group: whatever is taken off them all alike is a baseline. What a mean over few would take
    of a response's own reward is taken of the rewards beforehand.

    Args:
        module: Configured, its weights those that sample.
        world: Where its prompts come from.
    """
    responses, inner, many = all_responses(world), module.objective, len(world.responses)
    share = reward_share(module)
    if isinstance(module.advantages, LeaveOneOut) and inner.kl_placement != "reward_k1":
        share = (many - 1) / many  # undoes its factor for a group of so many
    rollout = score_responses(
        responses,
        partial(policy_alone, module),
        module.reference,
        share * checked_scores(module.reward, responses.samples),
        temperature=module.sampling.temperature,
        micro_batch_size=module.update.micro_batch_size,
        group_size=many,
    )
    in_reward = module.kl.coef if inner.kl_placement == "reward_k1" else 0.0
    rollout = module.advantages.estimate(rollout, kl_coef=in_reward, all_sum=lambda x: x)
    p = rollout.logprobs.sum(dim=1, keepdim=True).exp() / len(world.prompts)
    module.objective = Expected(inner.aggregation, inner.kl_placement, inner.loss, inner.entropy_coef, inner, p)
    rollout = rollout.with_advantages(p * rollout.advantages, rollout.returns)
    loss, _ = module._micro_loss(rollout, counts(rollout.response_mask), False)
    module.objective = inner
    return loss


def gradient_error(module: Any, world: EnumerableWorld, target: Target, noise: float = 0.05) -> float:
    """How far the module's expected update is from the exact gradient, at weights perturbed from the reference.

    Relative error of the direction: the length of an update is a convention (token means, whitening).

    Args:
        module: PPO, DPO or a relative of GRPO, configured with the world's reference; its policy is moved.
        world: Where its data come from.
        target: Of the module on this world.
        noise: Standard deviation of what is added to each weight.

    Returns:
        The distance between the two unit vectors; above 1e-5 is a bug.
    """
    if isinstance(module, PPOModule):
        assert module.actor_critic is not None
        policy = module.actor_critic.policy.network
    else:
        policy = module.policy.network
    perturb(policy, noise)
    weights = [p for p in policy.parameters() if p.requires_grad]
    if isinstance(module, PPOModule):
        module.loss = replace(module.loss, value_coef=0.0)  # the policy's term alone: a shared trunk has both
        update = ppo_update(module, world, target.rewards)
        logps = world.logps(policy, target.temperature)
        exact = -objective(logps, target.ref_logps, target.rewards, beta=target.beta).mean()
    elif isinstance(module, GRPOModule):
        update = group_update(module, world)
        exact = -target.objective(world.logps(policy, target.temperature)).mean()
    else:
        pairs = preference_weights(world)
        exact = exact_pair_loss(module, world.logps(policy) - target.ref_logps, pairs)
        module.loss = Population(module.loss, pairs)
        update = module.training_step(population_batch(world), 0)
    return direction_error(flat_gradient(update, weights), flat_gradient(exact, weights))


def exact_pair_loss(module: DPOModule, h: Tensor, weights: Tensor) -> Tensor:
    """The population loss from exact log-ratios, written out once more."""
    loss: PairLoss = module.loss
    gap = h[:, :, None] - h[:, None, :]
    formulas: dict[type, Callable[[Any], Tensor]] = {
        DPOLoss: lambda dpo: F.softplus(-dpo.beta * gap),
        IPOLoss: lambda ipo: (gap - 0.5 / ipo.tau) ** 2,
    }
    return (weights * formulas[type(loss)](loss)).sum()


@torch.no_grad()
def perturb(network: nn.Module, noise: float, seed: int = 0) -> None:
    """Add Gaussian noise of this standard deviation to every weight."""
    generator = torch.Generator().manual_seed(seed)
    for weight in network.parameters():
        weight.add_(noise * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))


def flat_gradient(loss: Tensor, weights: list[nn.Parameter]) -> Tensor:
    """The gradient as one vector, float64."""
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    pairs = zip(found, weights, strict=True)
    return torch.cat([torch.zeros(w.numel()) if g is None else g.flatten() for g, w in pairs]).double()


def direction_error(found: Tensor, exact: Tensor) -> float:
    """Distance between two directions: 0 for the same, 2 for opposite ones."""
    return float((F.normalize(found, dim=0) - F.normalize(exact, dim=0)).norm())
