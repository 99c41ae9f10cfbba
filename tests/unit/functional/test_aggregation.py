"""What a token weighs, against loops."""

import pytest
import torch

from rlhf_lightning.functional.aggregation import Counts, counts, token_weights

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()  # the third was filtered out
LOSS = torch.tensor([[1.0, 2.0, 3.0, 99.0], [10.0, 99.0, 99.0, 99.0], [99.0] * 4])
EXPECTED = {
    "token_mean": (1 + 2 + 3 + 10) / 4,
    "sequence_mean": (2 + 10) / 2,
    "sequence_sum": (6 + 10) / 2,
    "constant_length": (6 + 10) / (2 * 8),
}


@pytest.mark.parametrize("how", EXPECTED)
def test_by_hand(how):
    weights = token_weights(MASK, how=how, total=counts(MASK), longest=8)
    assert (weights * LOSS).sum().item() == pytest.approx(EXPECTED[how], abs=1e-6)
    assert weights[~MASK].eq(0).all()


@pytest.mark.parametrize("how", EXPECTED)
def test_parts_of_a_step_add_up_and_what_is_outside_of_it_does_not_count(how):
    total = Counts(*(a + b for a, b in zip(counts(MASK[:1]), counts(MASK[1:]), strict=True)))
    parts = [
        (token_weights(m, how=how, total=total, longest=8) * x).sum()
        for m, x in ((MASK[:1], LOSS[:1]), (MASK[1:], LOSS[1:]))
    ]
    assert float(sum(parts)) == pytest.approx(EXPECTED[how], abs=1e-6)


@pytest.mark.parametrize("how", EXPECTED)
def test_a_step_of_which_nothing_counts_is_zero_and_not_nan(how):
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert token_weights(nothing, how=how, total=counts(nothing), longest=8).eq(0).all()
