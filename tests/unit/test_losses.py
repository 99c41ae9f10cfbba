"""The loss classes that YAML names: the values of their formulas, and coefficients that mean nothing."""

import math
import re

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.losses import BradleyTerryLoss, PPOLoss

W, R = torch.tensor([2.0]), torch.tensor([-1.0])
MASK = torch.tensor([[True, True, False]])


def test_bradley_terry_adds_the_scaled_margin_and_the_centring_term():
    """Lead 3, margin 2, sum 1."""
    margin = torch.tensor([2.0])
    lead = {m: math.log1p(math.exp(-(3 - m))) for m in (0, 1, 2)}
    assert BradleyTerryLoss().pairs(W, R, margin).item() == pytest.approx(lead[2] + 0.01)
    assert BradleyTerryLoss(centering_coef=0.5).pairs(W, R, margin).item() == pytest.approx(lead[2] + 0.5)
    assert BradleyTerryLoss(0.0, margin_scale=0.5).pairs(W, R, margin).item() == pytest.approx(lead[1])
    assert BradleyTerryLoss(0.0, margin_scale=0.0).pairs(W, R, margin).item() == pytest.approx(lead[0])
    assert BradleyTerryLoss(0.5).pairs(W + 2, R + 2, margin).item() == pytest.approx(lead[2] + 0.5 * 5**2)


def test_ppo_policy_and_value_are_summed_over_counted_tokens():
    loss = PPOLoss(clip_range=0.1, value_clip_range=0.5)
    ratio = torch.tensor([[1.5, 1.0, 9.0]])
    policy, clipped = loss.policy(ratio.log(), torch.zeros(1, 3), torch.tensor([[1.0, -2.0, 5.0]]), MASK)
    assert policy.item() == pytest.approx(-1.1 + 2.0)
    assert clipped.item() == 1
    value, clipped = loss.value(torch.tensor([[1.0, 0.3, 9.0]]), torch.zeros(1, 3), torch.ones(1, 3), MASK)
    assert value.item() == pytest.approx(0.5 * (0.5**2 + 0.7**2))
    assert clipped.item() == 1


def test_ppo_adds_the_value_term_and_takes_the_entropy_off():
    policy, value, entropy = torch.tensor(3.0), torch.tensor(10.0), torch.tensor([[1.0, 2.0, torch.nan]])
    assert PPOLoss().total(policy, value, entropy, MASK).item() == pytest.approx(3.0 + 0.1 * 10)
    with_bonus = PPOLoss(value_coef=0.5, entropy_coef=0.01)
    assert with_bonus.total(policy, value, entropy, MASK).item() == pytest.approx(3.0 + 5.0 - 0.03)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (PPOLoss, {"clip_range": 0.0}, "clip_range is in (0, 1), not 0.0"),
        (PPOLoss, {"clip_range": 1.0}, "clip_range is in (0, 1), not 1.0"),
        (PPOLoss, {"value_clip_range": 0.0}, "value_clip_range must be positive, not 0.0"),
        (PPOLoss, {"value_coef": math.nan}, "value_coef must not be negative, not nan"),
        (PPOLoss, {"entropy_coef": -1.0}, "entropy_coef must not be negative, not -1.0"),
        (BradleyTerryLoss, {"centering_coef": -0.01}, "centering_coef must not be negative, not -0.01"),
        (BradleyTerryLoss, {"margin_scale": math.nan}, "margin_scale must not be negative, not nan"),
    ],
)
def test_coefficients_without_a_meaning_are_refused_by_name(kind, settings, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        kind(**settings)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (PPOLoss, {"clip_range": 1e-6, "value_clip_range": 1e-6, "value_coef": 0.0, "entropy_coef": 0.0}),
        (PPOLoss, {"clip_range": 0.999}),
        (BradleyTerryLoss, {"centering_coef": 0.0, "margin_scale": 0.0}),
    ],
)
def test_coefficients_at_the_edge_of_their_range_are_taken(kind, settings):
    loss = kind(**settings)
    assert {name: getattr(loss, name) for name in settings} == settings
