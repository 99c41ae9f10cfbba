"""Scores of steps against hand values, definitions written out, and what must not matter."""

import math

import pytest
import torch

from rlhf_lightning.functional.process import (
    aggregate_steps,
    first_error_f1,
    first_errors,
    step_bce_loss,
)

# 0.9, 0.8 and 0.5 are the hand values of the reference; the pad columns hold what would change every figure.
PROBABILITIES = torch.tensor([0.9, 0.8, 0.5])
LOGITS = torch.full((2, 7), 50.0)
LOGITS[0, [1, 3, 4]] = PROBABILITIES.logit()
LOGITS[1, 2] = torch.tensor(0.3).logit()
MASK = torch.zeros(2, 7, dtype=torch.bool)
MASK[0, [1, 3, 4]] = MASK[1, 2] = True


@pytest.mark.parametrize(
    ("how", "value"), [("product", 0.36), ("minimum", 0.5), ("last", 0.5), ("mean", (0.9 + 0.8 + 0.5) / 3)]
)
def test_hand_values_of_a_whole_solution(how, value):
    found = aggregate_steps(LOGITS, MASK, how).exp()
    torch.testing.assert_close(found, torch.tensor([value, 0.3]), rtol=1e-6, atol=1e-6)


def test_a_product_of_a_thousand_steps_does_not_underflow():
    logits = torch.full((1, 1000), math.log(0.01 / 0.99))
    found = aggregate_steps(logits, torch.ones_like(logits, dtype=torch.bool), "product")
    assert found.item() == pytest.approx(1000 * math.log(0.01), rel=1e-6)


@pytest.mark.parametrize("how", ["product", "minimum", "last", "mean"])
def test_what_stands_outside_the_mask_has_no_effect_not_even_nan(how):
    dirty = LOGITS.masked_fill(~MASK, torch.nan).requires_grad_()
    aggregate_steps(dirty, MASK, how).sum().backward()
    torch.testing.assert_close(aggregate_steps(dirty, MASK, how), aggregate_steps(LOGITS, MASK, how))
    assert (dirty.grad[~MASK] == 0).all()


def test_a_solution_without_a_step_is_refused():
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        aggregate_steps(LOGITS, MASK & torch.tensor([[True], [False]]), "product")


def test_an_untrained_head_costs_the_log_of_two_classes():
    assert step_bce_loss(torch.zeros(2), torch.tensor([1.0, 0.0])).tolist() == pytest.approx([math.log(2)] * 2)


def test_the_loss_is_the_cross_entropy_over_two_classes():
    """A softmax over (wrong, right), with logits whose difference is ours."""
    logits, labels = torch.randn(50, dtype=torch.float64), torch.randint(2, (50,))
    two = torch.stack([torch.zeros_like(logits), logits], dim=1) + torch.randn(50, 1, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(two, labels, reduction="none")
    torch.testing.assert_close(step_bce_loss(logits, labels.double()), expected)


def test_soft_labels_cost_their_entropy_at_least():
    p = torch.tensor(0.7, dtype=torch.float64)
    assert step_bce_loss(p.logit(), p).item() == pytest.approx(0.610864, abs=1e-6)
    around = step_bce_loss(p.logit() + torch.linspace(-1, 1, 21, dtype=torch.float64), p.expand(21))
    assert around.argmin() == 10


def test_the_gradient_is_how_far_the_probability_is_off():
    logits, labels = torch.randn(9, requires_grad=True), torch.rand(9)
    step_bce_loss(logits, labels).sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().sigmoid() - labels)


# right (1), wrong (0) or not labelled (None) step by step; what the model says; is the first error found, is there one
@pytest.mark.parametrize(
    ("labels", "scores", "found", "erroneous"),
    [
        ([1, 1, 1], [0.9, 0.6, 0.7], True, False),
        ([1, 1, 1], [0.9, 0.4, 0.7], False, False),
        ([1, 0, None], [0.9, 0.2, 0.9], True, True),
        ([1, 0, 1], [0.9, 0.2, 0.1], True, True),
        ([1, 0, 0], [0.3, 0.2, 0.1], False, True),  # held for wrong too early
        ([1, 0, 0], [0.9, 0.8, 0.1], False, True),  # and too late
        ([1, 0, None], [0.9, 0.8, 0.1], False, True),  # of the last step nobody said anything
    ],
)
def test_the_first_error_is_found_where_it_is(labels, scores, found, erroneous):
    mask = torch.tensor([[label is not None for label in labels]])
    table = torch.tensor([[label or 0.0 for label in labels]])
    got = first_errors(torch.tensor([scores]).logit(), table, mask)
    assert [x.item() for x in got] == [found, erroneous]


def test_f1_is_the_harmonic_mean_and_neither_class_can_be_given_up():
    assert first_error_f1(torch.tensor(0.5), torch.tensor(1.0)).item() == pytest.approx(2 / 3)
    assert first_error_f1(torch.tensor(0.0), torch.tensor(1.0)).item() == 0  # every solution is called right
    assert first_error_f1(torch.tensor(0.0), torch.tensor(0.0)).item() == 0
