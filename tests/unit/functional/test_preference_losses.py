"""DPO, cDPO and IPO: the table of values, gradient identities, and where each has its minimum."""

import math

import pytest
import torch

from rlhf_lightning.functional.preference import dpo_loss, ipo_loss

LOSSES = {
    "DPO": lambda w, r: dpo_loss(w, r, beta=0.1),
    "cDPO": lambda w, r: dpo_loss(w, r, beta=0.1, label_smoothing=0.1),
    "IPO": lambda w, r: ipo_loss(w, r, tau=0.1),
}


@pytest.mark.parametrize(
    ("name", "at_zero", "at_two_minus_one"),
    [("DPO", 0.693147, 0.554355), ("cDPO", 0.693147, 0.584355), ("IPO", 25.0, 4.0)],
)
def test_values_of_the_table(name, at_zero, at_two_minus_one):
    loss = LOSSES[name](torch.tensor([0.0, 2.0]), torch.tensor([0.0, -1.0]))
    assert loss.tolist() == pytest.approx([at_zero, at_two_minus_one], abs=2e-6)


def gradients(name, chosen, rejected):
    leaves = [chosen.clone().requires_grad_(), rejected.clone().requires_grad_()]
    return torch.autograd.grad(LOSSES[name](*leaves).sum(), leaves)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_chosen_and_rejected_cancel(name):
    w, r = torch.tensor([2.0, -3.0, 0.0], dtype=torch.float64), torch.tensor([-1.0, 4.0, 0.0], dtype=torch.float64)
    chosen, rejected = gradients(name, w, r)
    delta = w - r
    expected = {
        "DPO": -0.1 * torch.sigmoid(-0.1 * delta),
        "cDPO": 0.1 * (torch.sigmoid(0.1 * delta) - 0.9),
        "IPO": 2 * (delta - 5),
    }[name]
    torch.testing.assert_close(chosen, expected)
    torch.testing.assert_close(rejected, -expected)


def test_smoothed_dpo_is_least_where_the_model_says_what_the_labels_say():
    best = math.log(0.9 / 0.1) / 0.1
    chosen, _ = gradients("cDPO", torch.tensor([best, best - 1, best + 1]).double(), torch.zeros(3).double())
    assert chosen[0].item() == pytest.approx(0, abs=1e-6)
    assert chosen[1] < 0 < chosen[2]


def test_ipo_is_least_at_its_margin():
    loss = ipo_loss(torch.tensor([5.0, 4.0, 6.0]), torch.zeros(3), tau=0.1)
    assert loss.tolist() == pytest.approx([0, 1, 1], abs=1e-5)


def test_dpo_of_labels_that_the_policy_is_sure_of_does_not_overflow():
    loss = dpo_loss(torch.tensor([-1e5, 1e5]), torch.zeros(2), beta=0.1)
    assert loss.tolist() == pytest.approx([1e4, 0.0])


def test_the_reference_itself_costs_log_two_whatever_beta():
    h = torch.tensor([-30.0, 4.0])
    for beta in (0.01, 1.0, 5.0):
        assert dpo_loss(h, h, beta=beta).tolist() == pytest.approx([math.log(2)] * 2)


def test_the_population_optimum_of_dpo_is_the_reward_over_beta():
    """With true preference p = sigmoid(r_w - r_l), the expected gradient vanishes at h = r / beta."""
    beta, rewards = 0.5, torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)
    h = (rewards / beta).requires_grad_()
    i, j = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    p = torch.sigmoid(rewards[i] - rewards[j])
    (gradient,) = torch.autograd.grad((p * dpo_loss(h[i], h[j], beta=beta)).sum(), h)
    torch.testing.assert_close(gradient, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
