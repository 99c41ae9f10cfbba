"""Exact figures of a policy on an enumerable world, and the optimum that a module should reach there."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.logprobs import entropy, sequence_logprobs
from rlhf_lightning.functional.optimum import (
    exact_kl,
    expected,
    forward_kl_optimum,
    frontier_reward,
    kl_optimum,
    win_rates,
)
from rlhf_lightning.functional.rewards import process_scores
from rlhf_lightning.losses import DPOLoss, IPOLoss
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.modules import DPOModule, GRPOModule, PPOModule
from rlhf_lightning.rewards.enumerable import EnumerableReward
from rlhf_lightning.rollouts.advantages import GAE
from rlhf_lightning.rollouts.group_advantages import GroupMean, ReturnToGo
from rlhf_lightning.rollouts.kl_control import FixedKL
from rlhf_lightning.worlds import EnumerableWorld


@dataclass(frozen=True)
class Exact:
    """Where a policy stands; means over the prompts, nothing estimated.

    Attributes:
        kl_to_optimum: KL from the policy to the optimum, nats.
        lost_percent: Share of what the optimum gains over the reference, V* - V_ref, that the policy lacks.
        reward: Expected reward.
        kl: KL from the policy to the reference, nats.
        frontier_reward: The highest reward that any policy with this KL has.
        entropy: Of whole responses, nats.
    """

    kl_to_optimum: float
    lost_percent: float
    reward: float
    kl: float
    frontier_reward: float
    entropy: float


@dataclass(frozen=True)
class Target:
    """The optimum of ``E[reward] - beta KL(policy || reference)`` over all policies.

    Attributes:
        method: What reaches it.
        ref_logps: Of the reference. Shape (prompts, responses), float64, nats.
        rewards: Same shape. For IPO, how often a response wins.
        beta: Weight of the KL.
        temperature: Of the policy and the reference.
        forward: The penalty is KL(reference || policy) instead.
    """

    method: str
    ref_logps: Tensor
    rewards: Tensor
    beta: float
    temperature: float = 1.0
    forward: bool = False

    @property
    def logps(self) -> Tensor:
        """Log-probabilities of the optimum. Shape (prompts, responses), nats."""
        if self.forward:
            return forward_kl_optimum(self.ref_logps, self.rewards, beta=self.beta)
        return kl_optimum(self.ref_logps, self.rewards, beta=self.beta)[0]

    @property
    def value(self) -> float:
        """What the optimum reaches, mean over the prompts."""
        return float(self.objective(self.logps).mean())

    def objective(self, logps: Tensor) -> Tensor:
        """What is maximised, of a policy: expected reward less the penalty. Shape (prompts,)."""
        pair = (self.ref_logps, logps) if self.forward else (logps, self.ref_logps)
        return expected(logps, self.rewards) - self.beta * exact_kl(*pair)

    def exact(self, logps: Tensor) -> Exact:
        """Figures of a policy.

        Args:
            logps: Its log-probabilities of every response. Shape (prompts, responses), nats.
        """
        logps = logps.detach().double()
        to_optimum = float(exact_kl(logps, self.logps).mean())
        kl = float(exact_kl(logps, self.ref_logps).mean())
        gain = self.value - float(expected(self.ref_logps, self.rewards).mean())
        return Exact(
            kl_to_optimum=to_optimum,
            lost_percent=100 * (self.value - float(self.objective(logps).mean())) / gain,
            reward=float(expected(logps, self.rewards).mean()),
            kl=kl,
            frontier_reward=frontier_reward(self.ref_logps, self.rewards, max(kl, 0.0)),
            entropy=float(entropy(logps).mean()),
        )

    def summary(self) -> dict[str, Any]:
        """The optimum and the reference themselves, as plain data."""
        return {
            "beta": self.beta,
            "value": self.value,
            "optimum": asdict(self.exact(self.logps)),
            "reference": asdict(self.exact(self.ref_logps)),
        }


def target_of(module: Any, world: Any) -> Target:
    """What a module should reach on a world.

    Args:
        module: PPO or a relative of GRPO with a fixed KL coefficient, DPO or IPO.
        world: The source of its data.

    Raises:
        UserError: If the world can't be enumerated or the optimum is not known, with the key that is in the way.
    """
    if not isinstance(world, EnumerableWorld):
        raise UserError(f"the optimum is known on an EnumerableWorld only; data.source is {type(world).__name__}")
    if isinstance(module, PPOModule):
        return _ppo_target(module, world)
    if isinstance(module, GRPOModule):
        return _group_target(module, world)
    if isinstance(module, DPOModule) and module.reference_spec != module.policy_spec:
        raise UserError("the optimum is known relative to the policy's start only; leave model.reference out")
    if isinstance(module, DPOModule) and isinstance(module.loss, DPOLoss) and module.loss.label_smoothing == 0:
        return Target("DPO", world.ref_logps, world.rewards, module.loss.beta)
    if isinstance(module, DPOModule) and isinstance(module.loss, IPOLoss):
        return Target("IPO", world.ref_logps, win_rates(world.rewards, world.ref_logps) - 0.5, module.loss.tau)
    what = f"{type(module).__name__} with {module.loss}" if isinstance(module, DPOModule) else type(module).__name__
    raise UserError(
        f"{what} has no known optimum; PPOModule, GRPOModule and DPOModule with DPOLoss (no label_smoothing) or IPOLoss have"
    )


def _ppo_target(module: PPOModule, world: EnumerableWorld) -> Target:
    estimator, rewards = module.advantages, world.rewards
    _check_online(module, world)
    if module.loss.entropy_coef:
        raise UserError("the optimum with an entropy bonus is not known; set model.loss.entropy_coef to 0")
    if isinstance(estimator, GAE):
        if estimator.gamma != 1 or estimator.whiten_rewards:
            raise UserError(
                "with gamma below 1 or whitened rewards PPO aims at another optimum; leave model.advantages without"
            )
        cut = world.truncated.expand_as(rewards)
        rewards = process_scores(
            rewards, cut, missing_eos_penalty=estimator.missing_eos_penalty, clip=estimator.score_clip
        )
    return _online_target("PPO", module, world, rewards)


def _group_target(module: GRPOModule, world: EnumerableWorld) -> Target:
    objective, estimator = module.objective, module.advantages
    _check_online(module, world)
    if objective.entropy_coef:
        raise UserError("the optimum with an entropy bonus is not known; set model.objective.entropy_coef to 0")
    if objective.aggregation == "sequence_mean" or module.groups.mask_truncated:
        raise UserError(
            "a mean over the tokens of each response, and leaving out those that were cut off, lead to an optimum that is not "
            "known; set model.objective.aggregation to sequence_sum and model.groups.mask_truncated to false"
        )
    if isinstance(estimator, GroupMean) and estimator.scale != "none":
        raise UserError(
            "advantages over their standard deviation change the weight of the KL prompt by prompt; set model.advantages.scale "
            "to none"
        )
    forward = objective.kl_placement == "loss_k3_token"
    if forward and world.max_new_tokens > 1:
        raise UserError(
            "where k3 in the loss leads is known in closed form for responses of one token; set "
            "data.source.max_new_tokens and model.sampling.max_new_tokens to 1"
        )
    rewards = estimator.processed(world.rewards, world.truncated.expand_as(world.rewards))
    target = _online_target(type(estimator).__name__, module, world, rewards)
    return replace(target, beta=target.beta / reward_share(module), forward=forward)


def reward_share(module: GRPOModule) -> float:
    """How much of the reward an estimator leaves beside a KL that it does not touch.

    A group's mean that counts the response itself takes one k-th of it away: where the KL is not inside of what the mean is
    taken of, its weight is in effect k / (k - 1) as large. Leave-one-out has no such share.
    """
    estimator, size = module.advantages, module.groups.size
    in_loss = module.objective.kl_placement != "reward_k1"
    own = (isinstance(estimator, GroupMean) and in_loss) or (
        isinstance(estimator, ReturnToGo) and estimator.group_baseline
    )
    return (size - 1) / size if own else 1.0


def _check_online(module: Any, world: EnumerableWorld) -> None:
    if not isinstance(module.reward, EnumerableReward) or not torch.equal(module.reward.world.rewards, world.rewards):
        raise UserError(
            "the optimum is known for the world's own reward only; give EnumerableReward with the world of data.source"
        )
    if not isinstance(module.kl, FixedKL) or not module.kl.coef > 0:
        raise UserError("the optimum is known for a KL coefficient that stays and is positive; give model.kl a FixedKL")
    if module.sampling.max_new_tokens != world.max_new_tokens:
        raise UserError(
            f"the world's responses have {world.max_new_tokens} tokens; set model.sampling.max_new_tokens to that"
        )


def _online_target(method: str, module: Any, world: EnumerableWorld, rewards: Tensor) -> Target:
    temperature = module.sampling.temperature
    with torch.no_grad():
        ref_logps = world.logps(world.reference().double(), temperature)
    return Target(method, ref_logps, rewards, module.kl.coef, temperature)


def enumerated_rows(world: EnumerableWorld, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every prompt with every response, prompt by prompt, right-padded.

    Returns:
        Input ids, attention mask and response mask, (prompts * responses, prompt length + ``max_new_tokens``) each.
    """
    width = len(world.prompt_ids[0])
    rows = [[*x, *y] for x in world.prompt_ids for y in world.responses]
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    columns = torch.arange(width + world.max_new_tokens)
    ids = torch.tensor([row + [pad_id] * (len(columns) - len(row)) for row in rows])
    attention = columns < lengths
    return ids, attention, attention & (columns >= width)


def policy_logps(policy: PolicyNetwork, world: EnumerableWorld, temperature: float = 1.0) -> Tensor:
    """Log-probability of every response, by one forward of all of them.

    Args:
        policy: Gradients flow.
        world: Whose responses.
        temperature: Divides the logits.

    Returns:
        Shape (prompts, responses), float32, nats.
    """
    device = next(policy.parameters()).device
    rows = (x.to(device) for x in enumerated_rows(world, int(world.tokenizer().pad_token_id)))
    ids, attention, response = rows
    output = policy(ids, attention, response, temperature=temperature)
    return sequence_logprobs(output.logprobs, response[:, 1:]).view(len(world.prompts), len(world.responses))
