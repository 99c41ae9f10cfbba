"""CPO, SimPO and ORPO: values by hand, odds from probabilities, gradients."""

import math

import pytest
import torch

from rlhf_lightning.functional.reference_free import cpo_loss, log_odds, odds_ratio_loss, simpo_loss

W, R = torch.tensor([-1.0]), torch.tensor([-1.5])


def test_values_of_the_table():
    assert simpo_loss(W, R, beta=2.0, gamma=0.5).item() == pytest.approx(0.474077, abs=1e-6)
    assert simpo_loss(W, W, beta=2.0, gamma=0.5).item() == pytest.approx(0.974077, abs=1e-6)
    assert (log_odds(W) - log_odds(R)).item() == pytest.approx(0.706193, abs=1e-6)
    assert odds_ratio_loss(W, R).item() == pytest.approx(0.401135, abs=1e-6)
    assert cpo_loss(W, R, beta=0.1).item() == pytest.approx(math.log1p(math.exp(-0.05)), abs=1e-6)
    smoothed = 0.9 * math.log1p(math.exp(-0.05)) + 0.1 * math.log1p(math.exp(0.05))
    assert cpo_loss(W, R, beta=0.1, label_smoothing=0.1).item() == pytest.approx(smoothed, abs=1e-6)


def test_odds_are_those_of_the_geometric_mean():
    p = torch.tensor([1e-9, 0.2, 0.5, 0.9, 1 - 1e-9], dtype=torch.float64)
    torch.testing.assert_close(log_odds(p.log()), (p / (1 - p)).log(), rtol=1e-6, atol=1e-6)


def test_a_response_that_is_certain_has_finite_odds_and_gradient():
    means = torch.tensor([0.0, -1e-30, -200.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(odds_ratio_loss(means, torch.zeros(3)).sum(), means)
    assert log_odds(means).tolist() == pytest.approx([-math.log(2**-23)] * 2 + [-200.0], abs=1e-3)
    assert gradient.isfinite().all()


def test_gradients_by_hand():
    w, r = (torch.tensor([x, -0.7], dtype=torch.float64, requires_grad=True) for x in (-1.0, -1.5))
    slopes = torch.autograd.grad(simpo_loss(w, r, beta=2.0, gamma=0.5).sum(), [w, r])
    expected = -2 * torch.sigmoid(0.5 - 2 * (w - r)).detach()
    torch.testing.assert_close(slopes[0], expected)
    torch.testing.assert_close(slopes[1], -expected)
    # d logodds / d mean = 1 / (1 - p): ORPO's gradient has no bound as a response becomes certain.
    slopes = torch.autograd.grad(odds_ratio_loss(w, r).sum(), [w, r])
    p, q = w.detach().exp(), r.detach().exp()
    wrong = 1 / (1 + (p / (1 - p)) / (q / (1 - q)))
    torch.testing.assert_close(slopes[0], -wrong / (1 - p))
    torch.testing.assert_close(slopes[1], wrong / (1 - q))
