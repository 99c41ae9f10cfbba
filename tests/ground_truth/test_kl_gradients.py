"""Which estimator of the KL gives which gradient: every one that a trainer may use, beside the enumerated KL.

A good value is not a good gradient. Would have caught: k1 in the loss, whose gradient is zero in expectation (NeMo#2506, in
use until 2026); k3 in the reward, which TRL's PPO offers; the KL that was maximised for a while (verl a65c9157).
"""

import pytest
import torch
from enumeration import NOISE, direction_error, exact_gradient, perturb, relative_error

from rlhf_lightning.evaluation.exact import enumerated_rows
from rlhf_lightning.functional.advantages import gae
from rlhf_lightning.functional.kl import kl_k3
from rlhf_lightning.functional.optimum import exact_kl
from rlhf_lightning.functional.policy import clipped_policy_loss
from rlhf_lightning.functional.rewards import token_rewards
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.worlds import EnumerableWorld

EXACT, WRONG = 1e-5, 1e-2


class Everything:
    """Per-token log-probabilities of every response under a policy near its reference, and the exact gradients."""

    def __init__(self, max_new_tokens):
        self.world = world = EnumerableWorld(seed=0, max_new_tokens=max_new_tokens)
        self.network = world.reference()
        ids, attention, response = enumerated_rows(world, world.tokenizer().pad_token_id)
        self.mask = response[:, 2:]
        with torch.no_grad():
            self.ref = PolicyNetwork(world.reference())(ids, attention, response).logprobs[:, 1:]
        perturb(self.network, NOISE)
        self.logprobs = PolicyNetwork(self.network)(ids, attention, response).logprobs[:, 1:]
        self.old = self.logprobs.detach()
        self.p = self.old.sum(1, keepdim=True).exp() / len(world.prompts)
        self.d = self.logprobs - self.ref  # zero off the response
        self.rho = (self.logprobs - self.old).exp()

    def gradient(self, surrogate):
        """Of a sum over rows weighted by their probability, which is not differentiated: what sampling sees."""
        return self._of((self.p * surrogate).sum())

    def _of(self, value):
        found = torch.autograd.grad(value, list(self.network.parameters()), retain_graph=True, allow_unused=True)
        pairs = zip(found, self.network.parameters(), strict=True)
        return torch.cat([torch.zeros(w.numel()) if g is None else g.flatten() for g, w in pairs]).double()

    def exact(self, backward=False):
        """Gradient of KL(policy || reference), or of KL(reference || policy)."""
        logps = self.world.logps(self.network)
        pair = (self.world.ref_logps, logps) if backward else (logps, self.world.ref_logps)
        return exact_gradient(exact_kl(*pair).mean(), self.network)

    def in_reward(self, penalty):
        """The gradient that PPO's own formulas give to a penalty per token that is taken off the reward."""
        rewards = -penalty.detach().masked_fill(~self.mask, 0)
        advantages, _ = gae(rewards, torch.zeros_like(rewards), self.mask, gamma=1.0, gae_lambda=1.0)
        bounds = {"clip_low": 0.2, "clip_high": 0.2}
        return self._of(
            clipped_policy_loss(self.logprobs, self.old, self.p * advantages, self.mask, **bounds).loss.sum()
        )


@pytest.fixture(scope="module")
def two():
    return Everything(max_new_tokens=2)


@pytest.fixture(scope="module")
def one():
    """Responses of one token, where a token is the sequence."""
    return Everything(max_new_tokens=1)


@pytest.mark.parametrize("scores", [0.0, 3.0])
def test_k1_in_the_reward_is_the_gradient_of_the_kl(two, scores):
    """Through the formulas that PPO uses; a score that is the same for all changes nothing."""
    everywhere = torch.full((len(two.p),), scores)
    rewards = token_rewards(everywhere, two.old, two.ref, two.mask, kl_coef=1.0)
    assert relative_error(two.in_reward(-rewards), two.exact()) < EXACT


def test_k3_in_the_reward_is_the_difference_of_two_kls(two):
    """Of whole responses; near the reference the two cancel, and little is left of the penalty."""
    whole = kl_k3(two.d.detach().sum(1, keepdim=True))
    found = two.gradient(whole * two.logprobs)
    forward, backward = two.exact(), two.exact(backward=True)
    assert relative_error(found, forward - backward) < 1e-4
    assert direction_error(found, forward) > WRONG
    assert found.norm() < 0.6 * forward.norm()


def test_k3_in_the_reward_per_token_is_wrong(two):
    assert direction_error(two.in_reward(kl_k3(two.d)), two.exact()) > WRONG


def test_k1_in_the_loss_does_nothing(two):
    assert two.gradient(two.d).norm() < 1e-5 * two.exact().norm()


def test_k2_in_the_loss_is_exact_over_sequences_and_not_over_tokens(one, two):
    sequence = two.gradient(0.5 * two.d.sum(1, keepdim=True) ** 2)
    assert relative_error(sequence, two.exact()) < EXACT
    assert direction_error(two.gradient(0.5 * two.d**2), two.exact()) > WRONG
    assert relative_error(one.gradient(0.5 * one.d**2), one.exact()) < EXACT


def test_k3_in_the_loss_is_the_gradient_of_the_other_kl(one, two):
    """GRPO's term: exactly that of KL(reference || policy) where a response is one token, and never that of the KL."""
    assert relative_error(one.gradient(kl_k3(one.d)), one.exact(backward=True)) < EXACT
    assert direction_error(one.gradient(kl_k3(one.d)), one.exact()) > WRONG
    assert direction_error(two.gradient(kl_k3(two.d)), two.exact()) > WRONG


def test_k3_times_the_ratio_is_exact_over_sequences_and_not_over_tokens(one, two):
    """The unbiased form of DeepSeek-V3.2: the ratio is differentiated too."""
    whole_ratio = (two.logprobs - two.old).sum(1, keepdim=True).exp()
    sequence = two.gradient(whole_ratio * kl_k3(two.d.sum(1, keepdim=True)))
    assert relative_error(sequence, two.exact()) < EXACT
    assert direction_error(two.gradient(two.rho * kl_k3(two.d)), two.exact()) > WRONG
    assert relative_error(one.gradient(one.rho * kl_k3(one.d)), one.exact()) < EXACT


def test_values_k1_and_k3_are_the_kl_on_average_and_k2_is_not(two):
    kl = exact_kl(two.world.logps(two.network), two.world.ref_logps).mean().item()
    d = two.d.detach().double().sum(1, keepdim=True)
    p = two.p.double()
    assert (p * d).sum().item() == pytest.approx(kl, rel=1e-4)
    assert (p * kl_k3(d)).sum().item() == pytest.approx(kl, rel=1e-4)
    assert (p * 0.5 * d**2).sum().item() != pytest.approx(kl, rel=1e-2)
    assert kl > 0.01
