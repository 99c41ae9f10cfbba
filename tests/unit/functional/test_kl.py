"""KL estimators: hand values, and for each the gradient that it does and does not have, by enumeration."""

import math

import pytest
import torch

from rlhf_lightning.functional.kl import kl_k1, kl_k2, kl_k3

P, Q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
D = (P / Q).log()
KL = 0.218012


def variance(x):
    return ((P * x.square()).sum() - (P * x).sum().square()).item()


def test_expectations_by_hand():
    assert (P * kl_k1(D)).sum().item() == pytest.approx(KL, abs=1e-6)
    assert (P * kl_k3(D)).sum().item() == pytest.approx(KL, abs=1e-6)
    assert (P * kl_k2(D)).sum().item() == pytest.approx(0.209058, abs=1e-6)
    assert kl_k3(D).tolist() == pytest.approx([0.193147, 0.015655, 0.583709], abs=1e-6)
    assert variance(kl_k1(D)) == pytest.approx(0.3706, abs=1e-4)
    assert variance(kl_k3(D)) == pytest.approx(0.0393, abs=1e-4)


def test_k1_can_be_negative_and_k3_never_is():
    d = torch.linspace(-30, 30, 601)
    assert kl_k1(d).min() == -30
    assert kl_k3(d).min() >= 0
    assert kl_k2(torch.tensor([-2.0, 3.0])).tolist() == [2.0, 4.5]


@pytest.mark.parametrize("d", [1e-4, -1e-4])
def test_k3_of_a_tiny_ratio_is_positive_in_float32(d):
    plain = torch.exp(-torch.tensor(d)) - 1 + torch.tensor(d)
    assert not 4e-9 < plain.item() < 6e-9  # what float32 makes of the plain form
    assert kl_k3(torch.tensor(d)).item() == pytest.approx(5e-9, rel=0.2)
    assert kl_k3(torch.tensor(d, dtype=torch.float64)).item() == pytest.approx(5e-9, rel=1e-3)


def test_absurd_ratios_stay_finite():
    assert kl_k3(torch.tensor(-1e4)).item() == pytest.approx(math.expm1(40) - 40, rel=1e-6)
    assert kl_k3(torch.tensor(1e4)).item() == 9999  # nothing overflows on this side, so nothing is cut


def gradients(use):
    """Expected gradient over logits of what ``use(log pi, d)`` gives each outcome, outcomes drawn from the policy."""
    logits = P.log().clone().requires_grad_()
    log_p = logits.log_softmax(0)
    (gradient,) = torch.autograd.grad((P * use(log_p, log_p - Q.log())).sum(), logits)
    return gradient


def exact_gradient(kl):
    logits = P.log().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kl(logits.log_softmax(0)), logits)
    return gradient


@pytest.fixture
def reverse():
    return exact_gradient(lambda log_p: (log_p.exp() * (log_p - Q.log())).sum())


@pytest.fixture
def forward():
    return exact_gradient(lambda log_p: (Q * (Q.log() - log_p)).sum())


def test_k1_in_the_reward_has_the_gradient_of_the_kl(reverse):
    torch.testing.assert_close(gradients(lambda log_p, d: kl_k1(d).detach() * log_p), reverse)


def test_k1_in_the_loss_has_no_gradient():
    torch.testing.assert_close(gradients(lambda log_p, d: kl_k1(d)), torch.zeros(3, dtype=torch.float64))


def test_k2_in_the_loss_has_the_gradient_of_the_kl(reverse):
    torch.testing.assert_close(gradients(lambda log_p, d: kl_k2(d)), reverse)


def test_k3_in_the_loss_has_the_gradient_of_the_forward_kl(forward, reverse):
    torch.testing.assert_close(gradients(lambda log_p, d: kl_k3(d)), forward)
    assert (forward - reverse).abs().max() > 0.01


def test_k3_in_the_reward_is_off_by_the_forward_kl(forward, reverse):
    torch.testing.assert_close(gradients(lambda log_p, d: kl_k3(d).detach() * log_p), reverse - forward)
