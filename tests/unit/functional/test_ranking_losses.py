"""Bradley-Terry, centring, accuracy and calibration: hand values, gradients, invariances."""

import math

import pytest
import torch

from rlhf_lightning.functional.ranking import (
    bradley_terry_loss,
    centering_loss,
    expected_calibration_error,
    preference_accuracy,
)

CHOSEN, REJECTED = torch.tensor([2.0, -1.0, 0.3, 5.0]), torch.tensor([1.0, 1.5, 0.3, -4.0])


def gradients(loss, chosen=CHOSEN, rejected=REJECTED):
    leaves = [chosen.double().requires_grad_(), rejected.double().requires_grad_()]
    return torch.autograd.grad(loss(*leaves).sum(), leaves)


def test_bradley_terry_by_hand():
    r = torch.tensor([0.0, 1.0, 1.0, -3.0])
    loss = bradley_terry_loss(r, torch.zeros(4), margin=torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert loss.tolist() == pytest.approx([math.log(2), 0.313262, math.log(2), math.log(1 + math.exp(3))], abs=1e-6)
    assert bradley_terry_loss(torch.tensor(1.0), torch.tensor(0.0), margin=1.0).item() == pytest.approx(math.log(2))


def test_loss_of_all_pairs_of_four_ranked_scores():
    r = torch.tensor([2.0, 1.0, 0.0, -1.0])
    i, j = torch.triu_indices(4, 4, offset=1)
    assert bradley_terry_loss(r[i], r[j]).mean().item() == pytest.approx(0.207038, abs=1e-6)


def test_bradley_terry_sees_differences_only_and_its_gradients_cancel():
    torch.testing.assert_close(bradley_terry_loss(CHOSEN + 7, REJECTED + 7), bradley_terry_loss(CHOSEN, REJECTED))
    chosen, rejected = gradients(bradley_terry_loss)
    torch.testing.assert_close(chosen, -torch.sigmoid(-(CHOSEN - REJECTED).double()))
    torch.testing.assert_close(chosen + rejected, torch.zeros(4, dtype=torch.float64))


def test_a_margin_asks_for_a_greater_lead():
    margin = torch.tensor([1.0, 2 / 3, 1 / 3, 0.0])
    expected = [math.log1p(math.exp(-(w - r - m))) for w, r, m in zip(CHOSEN, REJECTED, margin, strict=True)]
    assert bradley_terry_loss(CHOSEN, REJECTED, margin=margin).tolist() == pytest.approx(expected, rel=1e-5)


def test_huge_differences_stay_finite():
    assert bradley_terry_loss(torch.tensor([-1e4, 1e4]), torch.zeros(2)).tolist() == [1e4, 0.0]


def test_centring_pulls_the_sum_of_a_pair_to_zero():
    assert centering_loss(torch.tensor([2.0, 1.0]), torch.tensor([-1.0, 2.0])).tolist() == [1.0, 9.0]
    chosen, rejected = gradients(centering_loss)
    torch.testing.assert_close(chosen, 2 * (CHOSEN + REJECTED).double())
    torch.testing.assert_close(rejected, chosen)


def test_a_tie_is_half_right():
    assert preference_accuracy(CHOSEN, REJECTED).tolist() == [1.0, 0.0, 0.5, 1.0]


def differences(confidences, accuracies, pairs):
    """For each confidence ``pairs`` differences, of which the share ``accuracy`` has the right sign."""
    rows = []
    for confidence, accuracy in zip(confidences, accuracies, strict=True):
        logit, right = math.log(confidence / (1 - confidence)), round(accuracy * pairs)
        rows += [logit] * right + [-logit] * (pairs - right)
    return torch.tensor(rows)


def test_calibration_error_by_hand():
    d = differences([0.55, 0.65, 0.75, 0.85, 0.95], [0.5, 0.7, 0.7, 0.9, 0.9], 10)
    assert expected_calibration_error(d).item() == pytest.approx(0.05, abs=1e-6)
    assert expected_calibration_error(d.flip(0)).item() == pytest.approx(0.05, abs=1e-6)


def test_calibration_error_weighs_bins_by_their_pairs():
    d = torch.cat([differences([0.95], [0.5], 30), differences([0.75], [0.8], 10)])
    assert expected_calibration_error(d).item() == pytest.approx(0.75 * 0.45 + 0.25 * 0.05, abs=1e-6)


def test_there_are_five_bins_and_a_confidence_of_one_is_in_the_last():
    """Sure of 0.69 and 0.72: with five bins of width 0.1 they stand apart, with six they would cancel in part."""
    d = torch.cat([differences([0.69], [1.0], 10), differences([0.72], [0.0], 10), torch.full((5,), 1e4)])
    expected = (10 * 0.31 + 10 * 0.72) / 25
    assert expected_calibration_error(d).item() == pytest.approx(expected, abs=1e-6)
    assert expected_calibration_error(d, bins=6).item() == pytest.approx((7.2 - 3.1) / 25, abs=1e-6)
    assert expected_calibration_error(d, bins=1).item() == pytest.approx((7.2 - 3.1) / 25, abs=1e-6)


def test_bins_are_made_where_the_differences_lie():
    difference = torch.tensor([0.0, 1e4])
    with torch.device("meta"):  # where new tensors go that are not told otherwise
        assert expected_calibration_error(difference).item() == 0.0


def test_a_model_that_is_always_sure_and_wrong_is_off_by_one():
    assert expected_calibration_error(torch.full((8,), -40.0)).item() == pytest.approx(1.0)
    assert expected_calibration_error(torch.full((8,), 40.0)).item() == pytest.approx(0.0)
    assert expected_calibration_error(torch.zeros(8)).item() == 0.0  # ties: half sure, half right


def test_two_ranks_are_calibrated_as_one_with_both_their_pairs(on_two_ranks):
    """Each alone is off by 0.45 and 0.05 at the same confidence; together by their weighted mean, signs kept."""
    parts = [differences([0.95], [0.5], 30), differences([0.95], [1.0], 10)]
    errors = on_two_ranks(lambda rank, all_sum: expected_calibration_error(parts[rank], all_sum=all_sum))
    assert [e.item() for e in errors] == pytest.approx([(30 * 0.45 - 10 * 0.05) / 40] * 2, abs=1e-6)


def test_calibration_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"^calibration needs at least one pair$"):
        expected_calibration_error(torch.zeros(0))
