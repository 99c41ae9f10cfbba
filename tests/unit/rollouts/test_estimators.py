"""How scores become advantages, and the controllers of the KL coefficient."""

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.rollouts.advantages import GAE
from rlhf_lightning.rollouts.buffer import Rollout
from rlhf_lightning.rollouts.kl_control import AdaptiveKL, FixedKL

LENGTHS = [2, 4, 3]
MASK = torch.arange(4) < torch.tensor(LENGTHS)[:, None]
SCORES = torch.tensor([1.0, 9.0, -2.0])
TRUNCATED = torch.tensor([False, True, False])


@pytest.fixture
def rollout():
    generator = torch.Generator().manual_seed(0)
    logprobs, ref, values = (torch.randn(3, 4, generator=generator) * MASK for _ in range(3))
    ids = torch.zeros(3, 6, dtype=torch.long)
    sequence = torch.cat([torch.zeros(3, 2, dtype=torch.bool), MASK], dim=1)
    zeros, groups = torch.zeros(3, 4), torch.arange(3)
    before = (ids, sequence, sequence, MASK, TRUNCATED, logprobs, ref, zeros, values)
    return Rollout(*before, SCORES, groups, torch.zeros(3), zeros, zeros)


def by_definition(rollout, scores, *, kl_coef, gae_lambda):
    """Advantages and returns, one token at a time, as lists."""
    advantages, returns = [], []
    for b, n in enumerate(LENGTHS):
        rewards = [-kl_coef * float(rollout.logprobs[b, t] - rollout.ref_logprobs[b, t]) for t in range(n)]
        rewards[-1] += scores[b]
        v = [float(rollout.values[b, t]) for t in range(n)] + [0.0]
        delta = [rewards[t] + v[t + 1] - v[t] for t in range(n)]
        advantages += [sum(gae_lambda ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
        returns += [advantages[-n + t] + v[t] for t in range(n)]
    return torch.tensor(advantages), torch.tensor(returns)


def alone(x):
    return x


@pytest.mark.parametrize("gae_lambda", [0.95, 1.0])
def test_advantages_are_whitened_and_returns_are_not(rollout, gae_lambda):
    estimated = GAE(gae_lambda=gae_lambda).estimate(rollout, kl_coef=0.3, all_sum=alone)
    advantages, returns = by_definition(rollout, [1.0, 8.0, -2.0], kl_coef=0.3, gae_lambda=gae_lambda)
    torch.testing.assert_close(estimated.returns[MASK], returns, rtol=1e-5, atol=1e-5)
    expected = (advantages - advantages.mean()) / advantages.std()
    torch.testing.assert_close(estimated.advantages[MASK], expected, rtol=1e-4, atol=1e-5)
    assert estimated.advantages[~MASK].eq(0).all()
    assert estimated.returns[~MASK].eq(0).all()


def test_advantages_may_be_left_unwhitened(rollout):
    estimated = GAE(whiten_advantages=False).estimate(rollout, kl_coef=0.3, all_sum=alone)
    advantages, _ = by_definition(rollout, [1.0, 8.0, -2.0], kl_coef=0.3, gae_lambda=0.95)
    torch.testing.assert_close(estimated.advantages[MASK], advantages, rtol=1e-5, atol=1e-5)
    assert estimated.advantages[~MASK].eq(0).all()


def test_the_return_of_the_first_token_is_score_minus_penalties(rollout):
    """With lambda 1 the critic drops out: score, less 1.5 where EOS is missing, clipped at 4, less beta KL."""
    estimator = GAE(gae_lambda=1.0, missing_eos_penalty=1.5, score_clip=4.0)
    returns = estimator.estimate(rollout, kl_coef=0.1, all_sum=alone).returns[:, 0]
    kl = (rollout.logprobs - rollout.ref_logprobs).sum(1)
    torch.testing.assert_close(returns, torch.tensor([1.0, 4.0 - 1.5, -2.0]) - 0.1 * kl, rtol=1e-5, atol=1e-5)


def test_rewards_may_be_scaled_to_unit_variance_with_their_mean_kept(rollout):
    estimator = GAE(gae_lambda=1.0, missing_eos_penalty=0.0, whiten_rewards=True)
    returns = estimator.estimate(rollout, kl_coef=0.2, all_sum=alone).returns
    rewards = -0.2 * (rollout.logprobs - rollout.ref_logprobs)
    rewards[torch.arange(3), torch.tensor(LENGTHS) - 1] += SCORES
    mean, std = rewards[MASK].mean(), rewards[MASK].std()
    for b, n in enumerate(LENGTHS):
        scaled = (rewards[b, :n] - mean) / std + mean
        torch.testing.assert_close(returns[b, :n], scaled.flip(0).cumsum(0).flip(0), rtol=1e-4, atol=1e-5)


def test_whitening_uses_the_sums_of_all_ranks(rollout):
    """A second rank with the same rows leaves the mean and takes the n - 1 of twice as many."""
    estimated = GAE().estimate(rollout, kl_coef=0.3, all_sum=lambda x: 2 * x).advantages[MASK]
    single = GAE().estimate(rollout, kl_coef=0.3, all_sum=alone).advantages[MASK]
    n = MASK.sum().item()
    torch.testing.assert_close(estimated, single * ((2 * n - 1) / (2 * n - 2)) ** 0.5, rtol=1e-5, atol=1e-6)


def test_a_fixed_coefficient_stays(rollout):
    control = FixedKL(0.07)
    control.update(kl=100.0, episodes=10_000)
    assert control.coef == 0.07
    assert FixedKL(0.0).coef == 0.0
    with pytest.raises(UserError, match="negative"):
        FixedKL(-0.1)


def test_an_adaptive_coefficient_rises_above_its_target_and_falls_below():
    control = AdaptiveKL()
    control.update(kl=12.0, episodes=256)
    assert control.coef == pytest.approx(0.150768)
    control = AdaptiveKL()
    control.update(kl=5.5, episodes=256)
    assert control.coef == pytest.approx(0.14968)
    control.update(kl=6.0, episodes=256)
    assert control.coef == pytest.approx(0.14968)


@pytest.mark.parametrize("fields", [{"init": 0.0}, {"target": -1.0}, {"horizon": 0}])
def test_an_adaptive_coefficient_needs_positive_numbers(fields):
    with pytest.raises(UserError, match="positive"):
        AdaptiveKL(**fields)
