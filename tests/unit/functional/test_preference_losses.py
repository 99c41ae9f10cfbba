"""Losses on the lead of the chosen response: the table of values, gradients by hand, and where each has its minimum."""

import math

import pytest
import torch

from rlhf_lightning.functional.preference import (
    aot_loss,
    dpo_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    robust_dpo_loss,
)

EPS = 0.1
LOSSES = {
    "DPO": lambda w, r: dpo_loss(w, r, beta=0.1),
    "cDPO": lambda w, r: dpo_loss(w, r, beta=0.1, label_smoothing=EPS),
    "robust": lambda w, r: robust_dpo_loss(w, r, beta=0.1, label_smoothing=EPS),
    "IPO": lambda w, r: ipo_loss(w, r, tau=0.1),
    "hinge": lambda w, r: hinge_loss(w, r, beta=0.1),
    "EXO": lambda w, r: exo_loss(w, r, beta=0.1, label_smoothing=0.001),
    "AOT of one pair": lambda w, r: torch.cat(
        [aot_loss(a[None], b[None], torch.zeros(1), torch.zeros(1), beta=0.1) for a, b in zip(w, r, strict=True)]
    ),
}
VALUES = {
    "DPO": (0.693147, 0.554355),
    "cDPO": (0.693147, 0.584355),
    "robust": (0.693147, 0.516855),
    "IPO": (25.0, 4.0),
    "hinge": (1.0, 0.7),
    "EXO": (2.761231, 2.258199),
    "AOT of one pair": (0.693147, 0.554355),
}


@pytest.mark.parametrize("name", LOSSES)
def test_values_of_the_table(name):
    loss = LOSSES[name](torch.tensor([0.0, 2.0]), torch.tensor([0.0, -1.0]))
    assert loss.tolist() == pytest.approx(VALUES[name], abs=1e-6)


def gradients(name, chosen, rejected):
    leaves = [chosen.clone().requires_grad_(), rejected.clone().requires_grad_()]
    return torch.autograd.grad(LOSSES[name](*leaves).sum(), leaves)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_chosen_and_rejected_cancel(name):
    w, r = torch.tensor([2.0, -3.0, 0.0], dtype=torch.float64), torch.tensor([-1.0, 4.0, 0.0], dtype=torch.float64)
    chosen, rejected = gradients(name, w, r)
    delta = w - r
    right, wrong = torch.sigmoid(0.1 * delta), torch.sigmoid(-0.1 * delta)
    expected = {
        "DPO": -0.1 * wrong,
        "cDPO": 0.1 * (right - 0.9),
        "robust": -0.1 * (0.9 * wrong + 0.1 * right) / 0.8,
        "IPO": 2 * (delta - 5),
        "hinge": torch.full((3,), -0.1, dtype=torch.float64),
        "EXO": 0.1 * right * wrong * (0.1 * delta - math.log(0.999 / 0.001)),
        "AOT of one pair": -0.1 * wrong,
    }[name]
    torch.testing.assert_close(chosen, expected)
    torch.testing.assert_close(rejected, -expected)


@pytest.mark.parametrize("name", LOSSES)
def test_a_level_that_both_have_changes_nothing(name):
    w, r = torch.tensor([2.0, -3.0]).double(), torch.tensor([-1.0, 4.0]).double()
    torch.testing.assert_close(LOSSES[name](w + 7, r + 7), LOSSES[name](w, r))


@pytest.mark.parametrize(
    ("name", "slope"), [("DPO", 0.1), ("cDPO", 0.1 * (1 - 2 * EPS)), ("robust", 0.1 / (1 - 2 * EPS))]
)
def test_swapped_labels_cost_the_lead(name, slope):
    """-ls(-x) = -ls(x) + x."""
    w, r = torch.tensor([2.0, -3.0, 0.5]).double(), torch.tensor([-1.0, 4.0, 0.0]).double()
    torch.testing.assert_close(LOSSES[name](r, w), LOSSES[name](w, r) + slope * (w - r))


def test_over_flipped_labels_robust_dpo_is_dpo_and_dpo_is_cdpo():
    w, r = torch.tensor([2.0, -3.0, 0.5]).double(), torch.tensor([-1.0, 4.0, 0.0]).double()
    over_flips = {name: (1 - EPS) * LOSSES[name](w, r) + EPS * LOSSES[name](r, w) for name in ("robust", "DPO")}
    torch.testing.assert_close(over_flips["robust"], LOSSES["DPO"](w, r))
    torch.testing.assert_close(over_flips["DPO"], LOSSES["cDPO"](w, r))


def test_smoothed_dpo_is_least_where_the_model_says_what_the_labels_say():
    best = math.log(0.9 / 0.1) / 0.1
    chosen, _ = gradients("cDPO", torch.tensor([best, best - 1, best + 1]).double(), torch.zeros(3).double())
    assert chosen[0].item() == pytest.approx(0, abs=1e-6)
    assert chosen[1] < 0 < chosen[2]


def test_exo_is_zero_where_the_model_says_what_the_labels_say():
    best = torch.tensor([math.log(0.8 / 0.2) / 0.5]).double()
    for away, expected in (
        (0.0, 0.0),
        (1e6, math.log(1 / 0.8)),
        (-1e6, math.log(1 / 0.2)),
    ):  # a sure model: log 1/label
        loss = exo_loss(best + away, torch.zeros(1).double(), beta=0.5, label_smoothing=0.2)
        assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_ipo_is_least_at_its_margin():
    loss = ipo_loss(torch.tensor([5.0, 4.0, 6.0]), torch.zeros(3), tau=0.1)
    assert loss.tolist() == pytest.approx([0, 1, 1], abs=1e-5)


def test_the_hinge_lets_go_of_a_lead_of_one():
    chosen, _ = gradients("hinge", torch.tensor([9.0, 11.0]), torch.zeros(2))
    assert chosen.tolist() == pytest.approx([-0.1, 0.0])


@pytest.mark.parametrize("name", ["DPO", "cDPO", "robust", "EXO"])
def test_labels_that_the_policy_is_sure_of_do_not_overflow(name):
    w = torch.tensor([-1e5, 1e5], requires_grad=True)
    loss = LOSSES[name](w, torch.zeros(2))
    (gradient,) = torch.autograd.grad(loss.sum(), w)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    if name == "DPO":
        assert loss.tolist() == pytest.approx([1e4, 0.0])


def test_the_reference_itself_costs_log_two_whatever_beta():
    h = torch.tensor([-30.0, 4.0])
    for beta in (0.01, 1.0, 5.0):
        assert dpo_loss(h, h, beta=beta).tolist() == pytest.approx([math.log(2)] * 2)


REWARDS = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("name", ["DPO", "robust", "EXO"])
def test_population_optima(name):
    """Of labels with p = sigmoid(r_w - r_l): DPO, and robust DPO on flipped ones, end at h = r / beta, whatever is compared.

    EXO of two responses ends where beta delta = (2 p - 1) log((1 - eps) / eps): it takes labels for what they say.
    """
    beta = 0.5
    h = (REWARDS / beta).requires_grad_()
    i, j = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    p = torch.sigmoid(REWARDS[i] - REWARDS[j])
    if name == "robust":
        p, loss = p * (1 - EPS) + (1 - p) * EPS, robust_dpo_loss(h[i], h[j], beta=beta, label_smoothing=EPS)
    elif name == "EXO":
        p = torch.sigmoid(REWARDS[0] - REWARDS[1])
        h = torch.stack([(2 * p - 1) * math.log(9) / beta, torch.zeros_like(p)]).requires_grad_()
        p, (i, j) = torch.stack([p, 1 - p]), (torch.tensor([0, 1]), torch.tensor([1, 0]))
        loss = exo_loss(h[i], h[j], beta=beta, label_smoothing=0.1)
    else:
        loss = dpo_loss(h[i], h[j], beta=beta)
    (gradient,) = torch.autograd.grad((p * loss).sum(), h)
    torch.testing.assert_close(gradient, torch.zeros_like(h), rtol=0, atol=1e-12)


# ---------------------------------------------------------------- AOT

LOGPS = torch.tensor(
    [[-3.0, -9.0, -4.0, -2.5, -7.0], [-5.0, -3.5, -4.5, -6.0, -1.0],
     [-4.0, -4.4, -6.0, -3.0, -3.0], [-2.0, -7.0, -5.5, -3.1, -8.0]], dtype=torch.float64,
)  # fmt: skip


def aot_by_hand(policy, reference):
    """Rank by rank."""
    total = 0.0
    for mine, theirs in zip(sorted(policy.tolist()), sorted(reference.tolist()), strict=True):
        total += math.log1p(math.exp(-0.3 * (mine - theirs)))
    return total


def test_aot_pairs_margins_by_rank():
    loss = aot_loss(*LOGPS, beta=0.3)
    assert loss.sum().item() == pytest.approx(aot_by_hand(LOGPS[0] - LOGPS[1], LOGPS[2] - LOGPS[3]), abs=1e-12)
    dpo = dpo_loss(LOGPS[0] - LOGPS[2], LOGPS[1] - LOGPS[3], beta=0.3)
    assert abs(float(loss.sum() - dpo.sum())) > 0.1  # which pairs each policy's margin with its own reference's


def test_aot_gives_each_pair_its_own_loss_whatever_the_order():
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(aot_loss(*LOGPS[:, order], beta=0.3), aot_loss(*LOGPS, beta=0.3)[order])


def test_aot_on_two_ranks_is_that_of_all_pairs():
    parts = LOGPS.split([2, 3], dim=1)
    margins = [[p[a] - p[a + 1] for p in parts] for a in (0, 2)]
    found = []
    for rank, part in enumerate(parts):
        asked = iter(margins)
        found.append(
            aot_loss(*part, beta=0.3, gather=lambda _, asked=asked, rank=rank: (torch.cat(next(asked)), 2 * rank))
        )
    torch.testing.assert_close(torch.cat(found), aot_loss(*LOGPS, beta=0.3))


def test_aot_smooths_labels_as_dpo_does():
    one = LOGPS[:, :1]
    expected = dpo_loss(one[0] - one[1], one[2] - one[3], beta=0.3, label_smoothing=0.2)
    torch.testing.assert_close(aot_loss(*one, beta=0.3, label_smoothing=0.2), expected)
