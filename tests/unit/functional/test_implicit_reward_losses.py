"""Losses on the level of each response's log-ratio: the table of values, gradients by hand, and that the level counts."""

import pytest
import torch

from rlhf_lightning.functional.implicit_rewards import (
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    nca_loss,
    sppo_hard_loss,
)

LOSSES = {
    "NCA": (nca_loss, 1.386294, 1.319407),
    "BCO": (bco_pair_loss, 1.386294, 1.242536),
    "SPPO": (sppo_hard_loss, 50.0, 25.0),
    "APO-zero": (apo_zero_loss, 1.0, 0.925187),
    "APO-down": (apo_down_loss, 1.0, 0.975391),
}
W = torch.tensor([2.0, -3.0, 0.0], dtype=torch.float64)
R = torch.tensor([-1.0, 4.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("name", LOSSES)
def test_values_of_the_table(name):
    loss, *expected = LOSSES[name]
    found = loss(torch.tensor([0.0, 2.0]), torch.tensor([0.0, -1.0]), beta=0.1)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def slope(x):
    """Of the sigmoid."""
    return torch.sigmoid(x) * torch.sigmoid(-x)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_hand(name):
    beta = 0.4
    a, b = beta * W, beta * R
    expected = {
        "NCA": (beta * (0.5 * torch.sigmoid(a) - torch.sigmoid(-a)), beta * 0.5 * torch.sigmoid(b)),
        "BCO": (-beta * torch.sigmoid(-a), beta * torch.sigmoid(b)),
        "SPPO": (2 * (W - 1.25), 2 * (R + 1.25)),
        "APO-zero": (-beta * slope(a), beta * slope(b)),
        "APO-down": (beta * (slope(a) - slope(a - b)), beta * slope(a - b)),
    }[name]
    leaves = [W.clone().requires_grad_(), R.clone().requires_grad_()]
    found = torch.autograd.grad(LOSSES[name][0](*leaves, beta=beta).sum(), leaves)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_a_level_that_both_have_changes_the_loss(name):
    loss = LOSSES[name][0]
    w, r = W[:2], R[:2]
    assert ((loss(w + 1, r + 1, beta=0.4) - loss(w, r, beta=0.4)).abs() > 1e-3).all()


def test_sppo_is_zero_at_its_two_marks():
    marks = torch.tensor([2.5, 3.5]).double()
    assert sppo_hard_loss(marks, -marks, beta=0.2).tolist() == pytest.approx([0.0, 2.0])


@pytest.mark.parametrize("name", LOSSES)
def test_log_ratios_that_ran_away_do_not_overflow(name):
    leaves = [torch.tensor([-1e5, 1e5], requires_grad=True), torch.tensor([1e5, -1e5], requires_grad=True)]
    loss = LOSSES[name][0](*leaves, beta=0.1)
    assert loss.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), leaves))
