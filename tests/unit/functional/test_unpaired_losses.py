"""KTO, APO-zero and BCO on single responses: values by hand, the gradients of their formulas, and KTO's reference point."""

import math

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.unpaired import bco_unpaired_loss, kto_baseline, kto_loss
from rlhf_lightning.losses import APOZeroUnpairedLoss, BCOUnpairedLoss, KTOLoss

LIKED, DISLIKED = torch.tensor([True]), torch.tensor([False])
H = torch.tensor([-3.0, -0.4, 0.5, 2.0, 7.0], dtype=torch.float64)


def number(x):
    return torch.tensor([x], dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("liked", "h", "expected"),
    [(True, 0.0, 0.512497), (False, 0.0, 0.487503), (True, 2.0, 0.462570), (False, -1.0, 0.462570)],
)
def test_kto_by_hand(liked, h, expected):
    loss = kto_loss(number(h), LIKED if liked else DISLIKED, number(0.5), beta=0.1)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("weight", [1.0, 1.3])
def test_at_its_reference_point_kto_is_half_of_the_weight(weight):
    both = torch.tensor([True, False])
    h = number(0.7).expand(2)
    loss = kto_loss(h, both, number(0.7), beta=0.4, desirable_weight=weight, undesirable_weight=2 * weight)
    assert loss.tolist() == pytest.approx([weight / 2, weight], abs=1e-12)


@pytest.mark.parametrize("liked", [True, False])
def test_the_gradient_of_kto_is_that_of_its_formula(liked):
    """-lambda beta sigma'(beta (h - z0)) for the liked, its mirror for the others: largest at the reference point."""
    beta, z0, weights = 0.3, 0.5, {"desirable_weight": 1.2, "undesirable_weight": 0.7}
    h = H.clone().requires_grad_()
    kto_loss(h, torch.full(H.shape, liked), number(z0), beta=beta, **weights).sum().backward()
    slopes = [sigmoid(beta * (x - z0)) * (1 - sigmoid(beta * (x - z0))) for x in H.tolist()]
    factor = -1.2 if liked else 0.7
    assert h.grad.tolist() == pytest.approx([factor * beta * slope for slope in slopes], abs=1e-12)
    assert h.grad.abs().argmax().item() == 2


@pytest.mark.parametrize("liked", [True, False])
def test_bco_by_hand_and_its_gradient(liked):
    """Binary cross-entropy of the logit beta h - Delta, Delta = beta times the mean; its gradient is probability less label."""
    beta, mean = 0.2, 0.6
    h = H.clone().requires_grad_()
    loss = bco_unpaired_loss(h, torch.full(H.shape, liked), number(mean), beta=beta, desirable_weight=3.0)
    p = [sigmoid(beta * x - beta * mean) for x in H.tolist()]
    factor = 3 if liked else 1
    expected = [-factor * math.log(x if liked else 1 - x) for x in p]
    assert loss.tolist() == pytest.approx(expected, abs=1e-12)
    loss.sum().backward()
    assert h.grad.tolist() == pytest.approx([factor * beta * (x - liked) for x in p], abs=1e-12)


def test_the_mirror_image_of_a_liked_answer_is_a_disliked_one():
    z0 = number(0.4)
    for loss in (kto_loss, bco_unpaired_loss):
        liked, disliked = (torch.full(H.shape, which) for which in (True, False))
        mirrored = loss(2 * z0 - H, disliked, z0, beta=0.7)
        assert loss(H, liked, z0, beta=0.7).tolist() == pytest.approx(mirrored.tolist(), abs=1e-12)


def test_unlike_dpo_the_level_of_the_log_ratios_counts():
    """DPO cancels a constant in the reference's log-probabilities; here the answer is compared with a number."""
    both, h = torch.tensor([True, False]), number(0.3).expand(2)
    before, after = (kto_loss(x, both, number(0.0), beta=1.0).sum().item() for x in (h, h + 1))
    assert before == pytest.approx(1, abs=1e-12)  # the two sides cancel as long as they move together
    assert after == pytest.approx(1, abs=1e-12)
    liked = [kto_loss(x, LIKED.expand(2), number(0.0), beta=1.0).sum().item() for x in (h, h + 1)]
    assert liked[1] < liked[0] - 0.3


def test_the_reference_point_is_a_mean_that_is_not_below_zero_and_has_no_gradient():
    ratios = torch.tensor([1.0, -0.5, 4.0], requires_grad=True)
    point = kto_baseline(ratios)
    assert point.item() == pytest.approx(1.5)
    assert not point.requires_grad
    assert kto_baseline(-ratios).item() == 0
    assert kto_baseline(ratios[:0]).item() == 0


def test_the_reference_point_is_over_all_ranks_before_it_is_cut_off(on_two_ranks):
    """Cut off on each rank first it would be 1; a mean of the ranks' means would be .5. One rank has a row more."""
    rows = [torch.tensor([2.0, 2.0, 2.0]), torch.tensor([-1.0])]
    assert on_two_ranks(lambda rank, all_sum: kto_baseline(rows[rank], all_sum=all_sum).item()) == [1.25, 1.25]
    apart = [torch.tensor([2.0]), torch.tensor([-3.0])]
    assert on_two_ranks(lambda rank, all_sum: kto_baseline(apart[rank], all_sum=all_sum).item()) == [0, 0]
    alone = [torch.tensor([2.0, 1.0]), torch.tensor([])]  # a rank with a single row has no mismatched one
    assert on_two_ranks(lambda rank, all_sum: kto_baseline(alone[rank], all_sum=all_sum).item()) == [1.5, 1.5]


def test_the_losses_that_yaml_names_are_these_formulas():
    liked, z0 = torch.tensor([True, False, True, True, False]), number(0.5)
    weights = {"desirable_weight": 1.1, "undesirable_weight": 0.9}
    kto, bco = (kind(beta=0.3, **weights) for kind in (KTOLoss, BCOUnpairedLoss))
    expected = kto_loss(H, liked, z0, beta=0.3, **weights)
    assert torch.equal(kto.rows(H, liked, z0), expected)
    assert torch.equal(APOZeroUnpairedLoss(beta=0.3, **weights).rows(H, liked, z0), expected)
    assert torch.equal(bco.rows(H, liked, z0), bco_unpaired_loss(H, liked, z0, beta=0.3, **weights))
    assert [loss.baseline for loss in (kto, bco, APOZeroUnpairedLoss())] == ["mismatched", "running_mean", "none"]
    assert [loss.reward_scale for loss in (kto, bco, APOZeroUnpairedLoss())] == [0.3, 0.3, 0.1]


@pytest.mark.parametrize("kind", [KTOLoss, APOZeroUnpairedLoss, BCOUnpairedLoss])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"desirable_weight": -1.0}, "desirable_weight must not be negative"),
        ({"undesirable_weight": float("nan")}, "undesirable_weight must not be negative"),
        ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, "nothing would be learnt"),
    ],
)
def test_senseless_coefficients_are_refused(kind, settings, words):
    with pytest.raises(UserError, match=words):
        kind(**settings)
