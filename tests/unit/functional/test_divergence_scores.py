"""Scores of f-divergences against the derivative of f itself, and DPO's table of values under each."""

import math

import pytest
import torch

from rlhf_lightning.functional.divergences import alpha_score, forward_kl_score, jensen_shannon_score
from rlhf_lightning.functional.preference import dpo_loss

SCORES = {
    "forward KL": forward_kl_score,
    "Jensen-Shannon": jensen_shannon_score,
    "alpha": lambda h: alpha_score(h, alpha=0.5),
}
# D_f(p || q) = sum q f(p / q), as in the papers.
GENERATORS = {
    "forward KL": lambda u: -u.log(),
    "Jensen-Shannon": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    "alpha": lambda u: (u**0.5 - 0.5 * u - 0.5) / (0.5 * -0.5),
}
H = torch.tensor([-3.0, -0.5, 0.0, 0.7, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "expected"), [("forward KL", 0.572316), ("Jensen-Shannon", 0.635589), ("alpha", 0.573243)]
)
def test_values_of_the_table(name, expected):
    score = SCORES[name]
    loss = dpo_loss(score(torch.tensor([0.0, 2.0])), score(torch.tensor([0.0, -1.0])), beta=0.1)
    assert loss.tolist() == pytest.approx([math.log(2), expected], abs=1e-6)


@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_the_derivative_of_f_but_for_a_constant(name):
    u = H.exp().requires_grad_()
    (derivative,) = torch.autograd.grad(GENERATORS[name](u).sum(), u)
    constant = derivative - SCORES[name](H)
    torch.testing.assert_close(constant, constant[:1].expand(5), rtol=0, atol=1e-12)


def test_alpha_goes_from_the_forward_to_the_reverse_kl():
    torch.testing.assert_close(alpha_score(H, alpha=1e-9), forward_kl_score(H) + 1)
    torch.testing.assert_close(alpha_score(H, alpha=1 - 1e-9), H, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", SCORES)
def test_a_response_that_the_policy_gave_up_has_a_finite_gradient(name):
    h = torch.tensor([3.0, -400.0], requires_grad=True)
    loss = dpo_loss(*SCORES[name](h), beta=0.1)
    (gradient,) = torch.autograd.grad(loss, h)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", SCORES)
def test_the_population_optimum_has_the_reward_as_its_score(name):
    """s(h) = r / beta + c: with p = sigmoid(r_w - r_l), no pair has a gradient there."""
    beta, rewards = 0.5, torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)
    score = rewards / beta - 3  # below zero, as all of these scores are
    h = {
        "forward KL": lambda s: -(-s).log(),
        "Jensen-Shannon": lambda s: s.exp().logit(),
        "alpha": lambda s: -2 * (1 - 0.5 * s).log(),
    }[name](score).requires_grad_()  # fmt: skip
    i, j = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    found = SCORES[name](h)
    p = torch.sigmoid(rewards[i] - rewards[j])
    (gradient,) = torch.autograd.grad((p * dpo_loss(found[i], found[j], beta=beta)).sum(), h)
    torch.testing.assert_close(gradient, torch.zeros_like(h), rtol=0, atol=1e-12)
