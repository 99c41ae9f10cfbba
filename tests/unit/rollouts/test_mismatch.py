"""An engine with numbers of its own: the weights by hand, and what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.policy import importance_weights
from rlhf_lightning.generation.engine import Generation
from rlhf_lightning.rollouts.mismatch import Importance, refuse_other_numbers, weighed

MASK = torch.tensor([[True, True, False]])
POLICY = torch.tensor([[math.log(0.6), math.log(0.9), 7.0]])
ENGINE = torch.tensor([[math.log(0.8), math.log(0.3), -7.0]])


def test_weights_are_policy_over_engine_up_to_the_cap_and_one_where_nothing_was_drawn():
    weights = importance_weights(POLICY, ENGINE, MASK, cap=2.0, how="token_truncate")
    torch.testing.assert_close(weights, torch.tensor([[0.75, 2.0, 1.0]]))


@pytest.mark.parametrize(
    ("how", "cap", "expected"),
    [
        ("token_mask", 2.0, [0.75, 0.0, 1.0]),
        ("sequence_truncate", 2.0, [2.0, 2.0, 1.0]),  # .75 x 3 = 2.25
        ("sequence_mask", 2.0, [0.0, 0.0, 1.0]),
        ("sequence_mask", 3.0, [2.25, 2.25, 1.0]),
    ],
)
def test_what_becomes_of_a_weight_beyond_the_cap(how, cap, expected):
    torch.testing.assert_close(importance_weights(POLICY, ENGINE, MASK, cap=cap, how=how), torch.tensor([expected]))


def test_a_token_that_is_too_far_from_the_policy_is_an_error_in_float32_and_not_in_half():
    refuse_other_numbers(POLICY, POLICY + 0.005, MASK, "32-true")
    refuse_other_numbers(POLICY, ENGINE, MASK, "bf16-mixed")
    with pytest.raises(UserError, match=r"up to 1\.1 nats"):
        refuse_other_numbers(POLICY, ENGINE, MASK, "32-true")


def test_an_engine_that_keeps_no_log_probabilities_can_not_be_corrected_for():
    with pytest.raises(UserError, match="has to give the log-probabilities"):
        weighed(SimpleNamespace(), Generation(torch.zeros(1, 3)), Importance())
