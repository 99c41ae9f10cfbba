"""Ensembles by hand and by their variance; the temperature against a grid, a closed form and two ranks."""

import math

import pytest
import torch

from rlhf_lightning.functional.calibration import first_half, fit_temperature, held_out_calibration
from rlhf_lightning.functional.ensembles import disagreement, uncertainty_weighted, worst_case
from rlhf_lightning.functional.ranking import bradley_terry_loss, expected_calibration_error

MEMBERS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0], [0.0, -6.0, 3.0]])


def test_ensembles_by_hand():
    assert worst_case(MEMBERS).tolist() == [1.0, 4.0, -6.0]
    assert uncertainty_weighted(MEMBERS, coefficient=0.5)[0].item() == pytest.approx(1.666667, abs=1e-6)
    assert uncertainty_weighted(MEMBERS, coefficient=0.5).tolist() == pytest.approx([2 - 1 / 3, 4.0, -1 - 7.0])
    assert uncertainty_weighted(MEMBERS, coefficient=0.0).tolist() == pytest.approx([2.0, 4.0, -1.0])
    assert disagreement(MEMBERS).tolist() == pytest.approx([math.sqrt(2 / 3), 0.0, math.sqrt(14)])


def test_a_soft_label_is_the_mean_of_both_labels_and_its_least_value_the_entropy():
    p = torch.tensor([0.7, 0.7, 0.5, 1.0, 0.0])
    lead = torch.tensor([math.log(0.7 / 0.3), 1.0, 0.0, 2.0, 2.0])
    loss = bradley_terry_loss(lead, torch.zeros(5), probability=p)
    mixed = 0.7 * math.log1p(math.exp(-1)) + 0.3 * math.log1p(math.exp(1))
    expected = [0.610864, mixed, math.log(2), math.log1p(math.exp(-2)), math.log1p(math.exp(2))]
    assert loss.tolist() == pytest.approx(expected, abs=1e-6)
    at_best = torch.tensor([math.log(0.7 / 0.3)], dtype=torch.float64, requires_grad=True)
    soft = bradley_terry_loss(at_best, torch.zeros(1), probability=torch.tensor([0.7], dtype=torch.float64))
    assert torch.autograd.grad(soft.sum(), at_best)[0].item() == pytest.approx(0, abs=1e-12)


def test_a_tie_pulls_two_scores_together():
    scores = torch.tensor([1.5, -0.5], dtype=torch.float64, requires_grad=True)
    half = torch.tensor(0.5, dtype=torch.float64)
    (slope,) = torch.autograd.grad(bradley_terry_loss(scores[0], scores[1], probability=half), scores)
    share = 1 / (1 + math.exp(-2.0)) - 0.5
    assert slope.tolist() == pytest.approx([share, -share])


def test_the_margin_of_a_soft_label_moves_where_it_is_best():
    lead = torch.tensor([1.0 + math.log(0.7 / 0.3)], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([0.7], dtype=torch.float64)
    loss = bradley_terry_loss(lead, torch.zeros(1), margin=1.0, probability=p).sum()
    assert torch.autograd.grad(loss, lead)[0].item() == pytest.approx(0, abs=1e-12)


def noisy_differences(scale, pairs=4000):
    """Leads of a model that is ``scale`` times too sure of itself."""
    generator = torch.Generator().manual_seed(0)
    truth = 2 * torch.randn(pairs, generator=generator)
    right = torch.rand(pairs, generator=generator) < torch.sigmoid(truth)
    return torch.where(right, 1.0, -1.0) * truth * scale


def test_one_kind_of_pair_has_a_closed_form():
    """Of leads that are all d apart, a share a of them right: sigma(d / T) = a."""
    lead = torch.tensor([3.0] * 8 + [-3.0] * 2)
    assert fit_temperature(lead) == pytest.approx(3 / math.log(0.8 / 0.2), rel=1e-6)


def test_no_temperature_of_a_fine_grid_is_likelier():
    lead = noisy_differences(3.0)
    found = fit_temperature(lead)

    def nll(t):
        return bradley_terry_loss(lead.double() / t, torch.zeros(())).mean().item()

    best = min((i / 1000 for i in range(500, 6000)), key=nll)
    assert found == pytest.approx(best, abs=1e-3)
    assert found == pytest.approx(3, rel=0.1)  # 4,000 pairs: a standard error of 3 %


def test_the_calibration_error_falls():
    lead = noisy_differences(3.0)
    before, after = (expected_calibration_error(x).item() for x in (lead, lead / fit_temperature(lead)))
    assert before > 0.1
    assert after < 0.02


def test_a_factor_on_the_scores_is_a_factor_on_the_temperature():
    lead = noisy_differences(1.0)
    assert fit_temperature(7 * lead) == pytest.approx(7 * fit_temperature(lead), rel=1e-6)


def test_ends_of_the_range_where_nothing_is_wrong_or_nothing_learnt():
    assert fit_temperature(torch.tensor([1.0, 2.0])) == pytest.approx(1e-3)
    assert fit_temperature(torch.tensor([-1.0, -2.0])) == pytest.approx(1e3)


def test_two_ranks_find_the_temperature_of_all_pairs(on_two_ranks):
    lead = noisy_differences(2.0, pairs=300)
    parts = [lead[:200], lead[200:]]
    found = on_two_ranks(lambda rank, all_sum: torch.tensor(fit_temperature(parts[rank], all_sum=all_sum)))
    assert [x.item() for x in found] == pytest.approx([fit_temperature(lead)] * 2, rel=1e-6)


def test_a_calibration_is_measured_on_pairs_that_it_was_not_fitted_to():
    """Leads of another scale in the other half: the temperature is that of the first, the error that of the second."""
    lead = torch.stack([noisy_differences(2.0, pairs=600), noisy_differences(5.0, pairs=600)], dim=1)
    lead[300:] *= 3
    fitted = torch.arange(600) < 300
    temperature, before, after = held_out_calibration(lead, fitted)
    expected = [fit_temperature(member) for member in lead[:300].unbind(1)]
    assert temperature.tolist() == pytest.approx(expected, rel=1e-6)
    errors = [expected_calibration_error(x / t).item() for x, t in zip(lead[300:].unbind(1), expected, strict=True)]
    assert after == pytest.approx(sum(errors) / 2, abs=1e-6)
    assert before == pytest.approx(
        sum(expected_calibration_error(x).item() for x in lead[300:].unbind(1)) / 2, abs=1e-6
    )
    overfitted = [expected_calibration_error(x / t).item() for x, t in zip(lead[:300].unbind(1), expected, strict=True)]
    assert abs(after - sum(overfitted) / 2) > 0.05


def test_halves_share_no_group_and_do_not_depend_on_order():
    groups = torch.tensor([7, -3, 7, 9, 2, 2, 9, 5])
    half = first_half(groups)
    assert set(groups[half].tolist()) == {-3, 2, 5}
    assert set(groups[~half].tolist()) == {7, 9}
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first_half(groups[order]), half[order])
