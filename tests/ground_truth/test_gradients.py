"""The expected step of every module, by enumeration through its own code under a Trainer, is the exact gradient.

Convergence is blind to wrong weights, for every advantage vanishes at the optimum; a gradient is not.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from enumeration import (
    Enumerated,
    PerturbedDPO,
    PerturbedPPO,
    PerturbedRewardModel,
    PerturbedSFT,
    Recorder,
    as_vector,
    direction_error,
    exact_gradient,
    relative_error,
    trained,
)

from rlhf_lightning.batches import PreferenceBatch, SequenceBatch
from rlhf_lightning.evaluation.exact import enumerated_rows
from rlhf_lightning.evaluation.gradients import (
    Population,
    all_responses,
    exact_values,
    population_batch,
    preference_weights,
)
from rlhf_lightning.functional.advantages import gae
from rlhf_lightning.functional.best_of_n import exponential_weights
from rlhf_lightning.functional.kl import kl_k3
from rlhf_lightning.functional.optimum import exact_kl, kl_optimum, objective
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.losses import (
    BradleyTerryLoss,
    DPOLoss,
    IPOLoss,
    NormalisedDPOLoss,
    PairLoss,
    PPOLoss,
    RankingLoss,
)
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules.ppo import PPOUpdate
from rlhf_lightning.rewards.enumerable import EnumerableReward
from rlhf_lightning.rewards.reward import checked_scores
from rlhf_lightning.rollouts.advantages import GAE, AdvantageEstimator
from rlhf_lightning.rollouts.collect import score_responses
from rlhf_lightning.rollouts.kl_control import FixedKL
from rlhf_lightning.worlds import EnumerableWorld

EXACT, WRONG = 1e-5, 1e-2
BETA = 0.7
PLAIN = GAE(gae_lambda=1.0, missing_eos_penalty=0.0, whiten_advantages=False)


def ppo(world, folder, estimator, *, true_values=False, critic=None, temperature=1.0, rows=10**6):
    module = PerturbedPPO(
        ModelSpec(path=folder),
        critic,
        EnumerableReward(world),
        kl=FixedKL(BETA),
        sampling=SamplingParameters(world.max_new_tokens, temperature),
        # On a trunk of its own a critic's loss does not reach the policy.
        loss=PPOLoss(value_coef=0.1 if critic else 0.0),
        advantages=Enumerated(estimator, len(world.prompts), world.rewards if true_values else None),
        update=PPOUpdate(epochs=1, minibatch_size=10**6, micro_batch_size=rows, max_grad_norm=1e9),
        optimizer=Recorder,
    )
    module.world = world
    return module


def ppo_gradients(world, module, seen):
    """What the step descended, and minus the exact gradient of J over the same number of tokens."""
    policy, temperature = trained(module), module.sampling.temperature
    with torch.no_grad():
        ref = world.logps(world.reference().double(), temperature)
    j = objective(world.logps(policy, temperature), ref, world.rewards, beta=BETA).mean()
    tokens = sum(map(len, world.responses)) * len(world.prompts)
    return as_vector(seen, policy), -exact_gradient(j, policy) / tokens


@pytest.fixture(scope="module")
def random_critic(world, tmp_path_factory):
    """A value network that knows nothing."""
    torch.manual_seed(5)
    fields = {
        "model_type": "phi",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    network = load_scalar_model(ModelSpec(architecture=fields), world.tokenizer(), new_head=True)
    return ModelSpec(path=str(export_folder(network, world.tokenizer(), tmp_path_factory.mktemp("critic") / "critic")))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [10**6, 50], ids=["one micro-batch", "five micro-batches"])
def test_ppo_with_lambda_one_needs_no_critic(world, folder, random_critic, one_step, temperature, rows):
    """Any critic is a baseline. The reference is tempered as the policy is.

    Would have caught: the KL gradient that was wrong until 2026 in NeMo RL (#2506), new log-probabilities at another
    temperature than the old ones (verl#2996), and micro-batches weighted alike whatever they hold (OpenRLHF#1249).
    """
    module = ppo(world, folder, PLAIN, critic=random_critic, temperature=temperature, rows=rows)
    found, exact = ppo_gradients(world, module, one_step(module))
    assert relative_error(found, exact) < EXACT


def test_ppo_with_lambda_below_one_needs_the_true_values(world, folder, one_step):
    """Would have caught: values read one token late (verl#1758), the score beside the last token (trl#3750)."""
    module = ppo(world, folder, replace(PLAIN, gae_lambda=0.95), true_values=True)
    found, exact = ppo_gradients(world, module, one_step(module))
    assert relative_error(found, exact) < EXACT


def test_ppo_with_lambda_below_one_and_a_critic_that_knows_nothing_is_biased(world, folder, random_critic, one_step):
    module = ppo(world, folder, replace(PLAIN, gae_lambda=0.95), critic=random_critic)
    found, exact = ppo_gradients(world, module, one_step(module))
    assert relative_error(found, exact) > WRONG


def test_whitening_changes_the_length_of_ppos_step_and_not_its_direction(world, folder, one_step):
    module = ppo(world, folder, replace(PLAIN, whiten_advantages=True))
    found, exact = ppo_gradients(world, module, one_step(module))
    assert direction_error(found, exact) < EXACT
    assert relative_error(found, exact) > WRONG


def test_in_ppos_first_minibatch_the_ratio_is_one_and_the_policy_has_not_moved(world, folder, one_step):
    """Would have caught: old and new log-probabilities that differ on-policy (verl#2996, #6280), dropout in the rollout."""
    module = ppo(world, folder, PLAIN, temperature=0.7, rows=50)
    counted = []
    module._finish = lambda rollout, stopped: counted.append(module.update_means.compute())
    one_step(module)
    assert counted[0]["val/ratio"].item() == pytest.approx(1, abs=1e-6)
    assert counted[0]["val/ratio_spread"].item() == pytest.approx(0, abs=1e-10)
    assert counted[0]["policy/approxkl_avg"].item() == pytest.approx(0, abs=1e-10)
    assert counted[0]["policy/clipfrac_avg"].item() == 0


@dataclass(frozen=True)
class Wrong(AdvantageEstimator):
    """Estimators that look right, learn, and even converge where every advantage vanishes."""

    bug: str

    def estimate(self, rollout, *, kl_coef, all_sum):
        mask, right = rollout.response_mask, PLAIN.estimate(rollout, kl_coef=kl_coef, all_sum=all_sum)
        advantages = right.advantages
        if self.bug == "mean over the response's tokens":  # GRPO's 1/|y|
            advantages = advantages / mask.sum(1, keepdim=True)
        elif self.bug == "EOS masked out of the loss":
            last = mask & ~F.pad(mask[:, 1:], (0, 1))
            advantages = advantages.masked_fill(last & ~rollout.truncated[:, None], 0)
        elif self.bug == "divided by the prompt's own spread":
            spread = self.spread_of_each_prompt(rollout, kl_coef)
            advantages = advantages / spread.repeat_interleave(len(rollout) // len(spread))[:, None]
        elif self.bug == "k3 in the reward":
            rewards = -kl_coef * kl_k3(rollout.logprobs - rollout.ref_logprobs).masked_fill(~mask, 0)
            rewards[torch.arange(len(rollout)), mask.sum(1) - 1] += rollout.scores
            advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, gae_lambda=1.0)
        elif self.bug == "KL a mean over tokens":
            penalty = (rollout.logprobs - rollout.ref_logprobs).sum(1) / mask.sum(1)
            advantages = (rollout.scores - kl_coef * penalty)[:, None] * mask
        return rollout.with_advantages(advantages, right.returns)

    def spread_of_each_prompt(self, rollout, kl_coef):
        p = rollout.logprobs.sum(1).exp().view(4, -1)
        total = rollout.scores.view(4, -1) - kl_coef * (rollout.logprobs - rollout.ref_logprobs).sum(1).view(4, -1)
        mean = (p * total).sum(1, keepdim=True)
        return (p * (total - mean) ** 2).sum(1).sqrt()


@pytest.mark.parametrize(
    "bug",
    [
        "mean over the response's tokens",
        "EOS masked out of the loss",
        "divided by the prompt's own spread",
        "k3 in the reward",
        "KL a mean over tokens",
    ],
)
def test_estimators_that_are_known_to_be_wrong_are_found_out(world, folder, one_step, bug):
    """In direction, whatever they are scaled by; the first three of them no convergence test can see."""
    module = ppo(world, folder, Wrong(bug))
    found, exact = ppo_gradients(world, module, one_step(module))
    assert direction_error(found, exact) > WRONG


# ---------------------------------------------------------------- DPO and IPO

PAIR_LOSSES = {
    DPOLoss(beta=0.5): lambda gap: -F.logsigmoid(0.5 * gap),
    DPOLoss(beta=0.5, label_smoothing=0.1): lambda gap: -0.9 * F.logsigmoid(0.5 * gap) - 0.1 * F.logsigmoid(-0.5 * gap),
    IPOLoss(tau=0.3): lambda gap: (gap - 1 / 0.6) ** 2,
}


@dataclass(frozen=True)
class Weighted(PairLoss):
    """A loss whose pairs count as often as they would be seen."""

    inner: PairLoss
    weights: torch.Tensor

    def pairs(self, pairs):
        return self.weights * self.inner.pairs(pairs)

    @property
    def reward_scale(self):
        return self.inner.reward_scale


def every_pair(world):
    """All ordered pairs of all prompts as one batch: rows of the enumeration as chosen, then as rejected."""
    n = len(world.responses)
    first, second = (x.flatten() for x in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    offsets = torch.arange(len(world.prompts))[:, None] * n
    index = torch.cat([(offsets + first).flatten(), (offsets + second).flatten()])
    ids, attention, response = (x[index] for x in enumerated_rows(world, world.tokenizer().pad_token_id))
    pairs = len(index) // 2
    return PreferenceBatch(ids, attention, response, torch.zeros(pairs), torch.tensor(1.0))


def exact_pair_gradient(world, module, formula):
    h = world.logps(trained(module)) - world.ref_logps
    gap = h[:, :, None] - h[:, None, :]
    return exact_gradient((preference_weights(world) * formula(gap)).sum(), trained(module))


@pytest.mark.parametrize("loss", PAIR_LOSSES, ids=str)
def test_dpo_and_ipo_over_every_ordered_pair(folder, one_step, loss):
    """Would have caught: a second EOS on every answer (trl#4481), log-ratios averaged over tokens where sums belong."""
    world = EnumerableWorld(seed=0, response_tokens=5, max_new_tokens=2)  # 21 responses, 441 pairs a prompt
    folder = export_folder(world.reference(), world.tokenizer(), f"{folder}_five_tokens")
    weighted = Weighted(loss, preference_weights(world).flatten())
    module = PerturbedDPO(ModelSpec(path=str(folder)), weighted, optimizer=Recorder)
    seen = one_step(module, [every_pair(world)])
    found = as_vector(seen, trained(module))
    assert relative_error(found, exact_pair_gradient(world, module, PAIR_LOSSES[loss])) < EXACT


def dpo_step(world, folder, one_step, loss, change=lambda batch: batch):
    module = PerturbedDPO(ModelSpec(path=folder), Population(loss, preference_weights(world)), optimizer=Recorder)
    seen = one_step(module, [change(population_batch(world))])
    return module, as_vector(seen, trained(module))


@pytest.mark.parametrize("loss", PAIR_LOSSES, ids=str)
def test_dpo_and_ipo_over_the_population_of_pairs(world, folder, one_step, loss):
    module, found = dpo_step(world, folder, one_step, loss)
    assert relative_error(found, exact_pair_gradient(world, module, PAIR_LOSSES[loss])) < EXACT


@pytest.mark.slow
def test_dpo_over_the_population_of_four_hundred_responses(tmp_path, one_step):
    world = EnumerableWorld(seed=2)
    folder = str(export_folder(world.reference(), world.tokenizer(), tmp_path / "reference"))
    loss = DPOLoss(beta=0.5)
    module, found = dpo_step(world, folder, one_step, loss)
    assert relative_error(found, exact_pair_gradient(world, module, PAIR_LOSSES[loss])) < EXACT


@pytest.mark.parametrize("bug", ["length-averaged", "without EOS", "beta halved"])
def test_dpo_that_is_known_to_be_wrong_is_found_out(world, folder, one_step, bug):
    loss, eos = DPOLoss(beta=0.5), world.tokenizer().eos_token_id
    wrong = {
        "length-averaged": NormalisedDPOLoss(0.5),
        "beta halved": DPOLoss(beta=0.25),
    }

    def change(batch):
        return batch._replace(response_mask=batch.response_mask & (batch.input_ids != eos)) if "EOS" in bug else batch

    module, found = dpo_step(world, folder, one_step, wrong.get(bug, loss), change)
    assert direction_error(found, exact_pair_gradient(world, module, PAIR_LOSSES[loss])) > WRONG


# ---------------------------------------------------------------- SFT and the reward model


def demonstrations(world, counts):
    """Response y of prompt x ``counts[x, y]`` times over; the normaliser is the number of their tokens."""
    ids, attention, response = enumerated_rows(world, world.tokenizer().pad_token_id)
    index = torch.arange(len(ids)).repeat_interleave(counts.flatten())
    tokens = response[index].sum().float()
    return SequenceBatch(ids[index], attention[index], response[index], tokens)


def test_sft_over_every_response(world, folder, one_step):
    """Would have caught: EOS labels that pad-equals-EOS deletes (trl#3200), prompts that are learnt, a double shift."""
    counts = torch.randint(0, 4, (4, 57), generator=torch.Generator().manual_seed(1))
    module = PerturbedSFT(ModelSpec(path=folder), optimizer=Recorder)
    batch = demonstrations(world, counts)
    found = as_vector(one_step(module, [batch]), trained(module))
    nll = (
        -(counts * world.logps(trained(module))).sum()
        / (counts * torch.tensor([len(y) for y in world.responses])).sum()
    )
    assert relative_error(found, exact_gradient(nll, trained(module))) < EXACT


def test_reward_weighted_sft_goes_down_the_kl_to_the_optimum(world, folder, one_step):
    """Each response weighs what all samples of it from the reference would: the step is that of KL(pi*, policy)."""
    ref, rewards, beta = world.logps(world.reference()).detach().double(), world.rewards, 0.7
    weights = exponential_weights(rewards + beta * ref, beta=beta).float()
    ids, attention, response = enumerated_rows(world, world.tokenizer().pad_token_id)
    tokens = (weights.flatten() * response.sum(1)).sum()
    module = PerturbedSFT(ModelSpec(path=folder), optimizer=Recorder)
    batch = SequenceBatch(ids, attention, response, tokens, weights.flatten())
    found = as_vector(one_step(module, [batch]), trained(module))
    optimum = kl_optimum(ref, rewards, beta=beta)[0]
    kl = exact_kl(optimum, world.logps(trained(module)).double()).sum() / tokens
    assert relative_error(found, exact_gradient(kl, trained(module))) < EXACT


@dataclass(frozen=True)
class WeightedRanking(RankingLoss):
    """Bradley-Terry over all ordered pairs, from the score of every response as chosen and as rejected."""

    weights: torch.Tensor
    inner: RankingLoss

    def pairs(self, chosen, rejected, margin, probability=None):
        prompts, n, _ = self.weights.shape
        first, second = (x.flatten() for x in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
        chosen, rejected = (
            scores.view(prompts, n)[:, i].flatten() for scores, i in ((chosen, first), (rejected, second))
        )
        return self.weights.flatten() * self.inner.pairs(chosen, rejected, torch.zeros_like(chosen))


def plain_scores(world, network):
    """The raw score of each response, by forwards without padding."""
    columns = []
    for y in world.responses:
        ids = torch.tensor([[*x, *y] for x in world.prompt_ids])
        hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
        columns.append(network.score(hidden).squeeze(1))
    return torch.stack(columns, dim=1).double()


def test_the_reward_model_over_every_ordered_pair(world, folder, one_step):
    """Would have caught: the score read before EOS or on padding (trl#6952), margins lost on the way (OpenRLHF)."""
    weights = preference_weights(world)
    torch.manual_seed(0)
    loss = WeightedRanking(weights, BradleyTerryLoss(centering_coef=0.02))
    module = PerturbedRewardModel(ModelSpec(path=folder), loss, optimizer=Recorder, normalise=False)
    found = as_vector(one_step(module, [population_batch(world)]), trained(module))
    r = plain_scores(world, trained(module))
    loss_table = F.softplus(r[:, None, :] - r[:, :, None]) + 0.02 * (r[:, :, None] + r[:, None, :]) ** 2
    assert relative_error(found, exact_gradient((weights * loss_table).sum(), trained(module))) < EXACT


# ---------------------------------------------------------------- the oracle's own parts


def test_exact_values_against_a_loop_over_prefixes(world, folder):
    module = ppo(world, folder, PLAIN)
    module.configure_model()
    responses = all_responses(world)
    scored = module.actor_critic, module.reference, checked_scores(module.reward, responses.samples)
    rollout = score_responses(responses, *scored, temperature=1.0, micro_batch_size=64)
    values = exact_values(rollout, world.rewards, kl_coef=BETA)
    for row in (0, 5, 57 + 30, 3 * 57 + 56):
        x, y = divmod(row, 57)
        for t in range(len(world.responses[y])):
            mass = total = 0.0
            for z, other in enumerate(world.responses):
                if other[:t] == world.responses[y][:t] and len(other) > t:
                    d = (rollout.logprobs - rollout.ref_logprobs)[57 * x + z]
                    p = math.exp(rollout.logprobs[57 * x + z].sum())
                    mass += p
                    total += p * (world.rewards[x, z].item() - BETA * d[t:].sum().item())
            assert values[row, t].item() == pytest.approx(total / mass, abs=1e-5)


def test_all_weights_take_part(world, folder, one_step):
    """The gradients that are compared are not those of a part of the network."""
    module = ppo(world, folder, PLAIN)
    found, _ = ppo_gradients(world, module, one_step(module))
    assert (found != 0).float().mean() > 0.9
