"""The pair losses that YAML names: hand values, what they need, what they refuse, and that layout means nothing to them."""

import math
import re
from dataclasses import replace

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.preference import dpo_loss
from rlhf_lightning.losses import (
    AlphaDivergence,
    AOTLoss,
    APODownLoss,
    APOZeroLoss,
    BCOPairLoss,
    CPOLoss,
    DPOLoss,
    EXOLoss,
    FDPOLoss,
    ForwardKL,
    HingeLoss,
    IPOLoss,
    JensenShannon,
    LDDPOLoss,
    MixedLoss,
    NCALoss,
    NLLLoss,
    NormalisedDPOLoss,
    ORPOLoss,
    RobustDPOLoss,
    SimPOLoss,
    SPPOHardLoss,
    WPOLoss,
)
from rlhf_lightning.losses.dpo import DiscoPOPLoss, DPOPLoss
from rlhf_lightning.losses.pairs import Needs, Pairs, ScoredResponses, halves
from tests.pairs import of_tokens, pairs_of

LN2 = math.log(2)
# At log-ratios of zero, and at 2 and -1 over two and three tokens.
VALUES = {
    DPOLoss(): (LN2, 0.554355),
    DPOLoss(label_smoothing=0.1): (LN2, 0.584355),
    RobustDPOLoss(): (LN2, 0.516855),
    IPOLoss(): (25.0, 4.0),
    HingeLoss(): (1.0, 0.7),
    EXOLoss(): (2.761231, 2.258199),
    NCALoss(): (1.386294, 1.319407),
    BCOPairLoss(): (1.386294, 1.242536),
    SPPOHardLoss(): (50.0, 25.0),
    APOZeroLoss(): (1.0, 0.925187),
    APODownLoss(): (1.0, 0.975391),
    DiscoPOPLoss(): (0.846574, 0.740357),
    DPOPLoss(): (LN2, 0.554355),
    NormalisedDPOLoss(beta=0.1): (LN2, 0.628701),
    FDPOLoss(): (LN2, 0.572316),
    FDPOLoss(divergence=JensenShannon()): (LN2, 0.635589),
    FDPOLoss(divergence=AlphaDivergence()): (LN2, 0.573243),
    LDDPOLoss(): (LN2, 0.561482),
    LDDPOLoss(alpha=1.0): (LN2, 0.554355),
    AOTLoss(): (LN2, 0.554355),
}
FREE = [NLLLoss(), NLLLoss(per_token=True), CPOLoss(), SimPOLoss(), ORPOLoss()]
MIXED = MixedLoss([DPOLoss(), NLLLoss(), LDDPOLoss()], [1.0, 0.3, 0.7])
ALL = [*VALUES, *FREE, WPOLoss(), WPOLoss(SimPOLoss()), MIXED]


@pytest.mark.parametrize("loss", VALUES, ids=str)
def test_values_of_the_table(loss):
    pairs = [pairs_of(torch.tensor([w]), torch.tensor([r]), (2, 3)) for w, r in ((0.0, 0.0), (2.0, -1.0))]
    assert [loss.pairs(pair).item() for pair in pairs] == pytest.approx(VALUES[loss], abs=1.1e-6)


# Two tokens of mean -1, and three of mean -1.5.
TWO = of_tokens([-0.5, -1.5], [-1.0, -1.5, -2.0], collisions=-1.2)
CONTRAST = math.log1p(math.exp(-0.1 * (-2 + 4.5)))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (SimPOLoss(gamma=0.5), 0.474077),
        (ORPOLoss(), 1 + 0.1 * 0.401135),
        (ORPOLoss(beta=0.5), 1 + 0.5 * 0.401135),
        (CPOLoss(nll_coef=0.0), CONTRAST),
        (CPOLoss(), CONTRAST + 2),
        (CPOLoss(nll_coef=0.5), CONTRAST + 1),
        (NLLLoss(), 2.0),
        (NLLLoss(per_token=True), 1.0),
        (MixedLoss([SimPOLoss(gamma=0.5), NLLLoss()], [0.5, 0.1]), 0.5 * 0.474077 + 0.2),
        # Chosen is e^(1.2 - 1) as likely as typical, rejected e^(1.2 - 1.5).
        (WPOLoss(SimPOLoss(gamma=0.5)), math.exp(0.2 - 0.3) * 0.474077),
    ],
    ids=str,
)
def test_values_without_a_reference(loss, expected):
    assert loss.pairs(TWO).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "chosen", "rejected"),
    [
        (DPOLoss(beta=0.5), 1.0, -0.5),
        (IPOLoss(tau=0.5), 1.0, -0.5),
        (CPOLoss(beta=0.5), 1.0, -0.5),
        (SimPOLoss(beta=0.5), 0.5, -1 / 6),
        (ORPOLoss(beta=0.5), 0.5, -1 / 6),
        (NLLLoss(), 2.0, -1.0),
        (WPOLoss(DPOLoss(beta=0.5)), 1.0, -0.5),
        (MixedLoss([DPOLoss(beta=0.5), NLLLoss()], [1, 1]), 1.0, -0.5),
    ],
    ids=str,
)
def test_implicit_rewards_are_of_sums_or_means(loss, chosen, rejected):
    responses = pairs_of(torch.tensor([2.0]), torch.tensor([-1.0]), (2, 3)).responses
    assert loss.rewards(responses).tolist() == pytest.approx([chosen, rejected])
    assert loss.reward_scale == (1.0 if isinstance(loss, NLLLoss) else 0.5)


def test_what_is_counted_beside_the_loss():
    pairs = of_tokens([-0.5, -1.5], [-1.0, -1.5, -2.0])
    for loss in (NLLLoss(), CPOLoss(), ORPOLoss()):
        total, count = loss.counted(pairs)["nll_loss"]
        assert (total.item(), count.item()) == (2.0, 2)
        assert loss.counted(pairs).keys() == set(loss.measures)
    odds = {name: float(total) / count for name, (total, count) in ORPOLoss().counted(pairs).items()}
    assert odds["log_odds_chosen"] == pytest.approx(0.706193, abs=1e-6)
    assert odds["log_odds_ratio"] == pytest.approx(-0.401135, abs=1e-6)
    total, count = WPOLoss(SimPOLoss()).counted(TWO)["wpo_weight"]
    assert (total.item(), count) == (pytest.approx(math.exp(-0.1)), 1)
    both = MixedLoss([WPOLoss(CPOLoss()), NLLLoss()], [1, 1])
    assert both.measures == ("nll_loss", "wpo_weight")
    assert both.counted(TWO).keys() == {"nll_loss", "wpo_weight"}


def test_the_weights_of_wpo_have_no_gradient():
    """Would the policy be paid for making both responses look strange, it did."""
    leaf = TWO.responses.logprobs.nan_to_num().requires_grad_()
    found, expected = (
        torch.autograd.grad(loss.pairs(Pairs(replace(TWO.responses, logprobs=leaf))).sum(), leaf)[0]
        for loss in (WPOLoss(SimPOLoss()), SimPOLoss())
    )
    torch.testing.assert_close(found, math.exp(-0.1) * expected)


@pytest.mark.parametrize(
    ("loss", "needs"),
    [
        (DPOLoss(), Needs.REFERENCE),
        (SPPOHardLoss(), Needs.REFERENCE),
        (LDDPOLoss(), Needs.REFERENCE_TOKENS),
        (AOTLoss(), Needs.REFERENCE | Needs.WHOLE_STEP),
        (SimPOLoss(), Needs.NOTHING),
        (WPOLoss(), Needs.REFERENCE | Needs.COLLISIONS),
        (WPOLoss(ORPOLoss()), Needs.COLLISIONS),
        (MixedLoss([CPOLoss(), NLLLoss()], [1, 1]), Needs.NOTHING),
        (MixedLoss([NLLLoss(), WPOLoss(AOTLoss())], [1, 1]), Needs.REFERENCE | Needs.WHOLE_STEP | Needs.COLLISIONS),
    ],
    ids=str,
)
def test_what_a_loss_is_to_be_given(loss, needs):
    assert loss.needs == needs
    assert loss.needs_reference == bool(needs & (Needs.REFERENCE | Needs.REFERENCE_TOKENS))


# ---------------------------------------------------------------- layout


def drawn(count=5, width=7, seed=0):
    """Pairs of uneven length, NaN where no token is."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (2 * count, 1), generator=generator)
    mask = torch.arange(width) < lengths
    parts = [-2 * torch.rand(mask.shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    logprobs, ref_logprobs, collisions = (part.masked_fill(~mask, torch.nan) for part in parts)
    return ScoredResponses(logprobs, mask, ref_logprobs, collisions=collisions)


def differentiated(loss, responses):
    """Losses, and the gradient of their sum."""
    leaf = responses.logprobs.clone().requires_grad_()
    losses = loss.pairs(Pairs(replace(responses, logprobs=leaf)))
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


@pytest.mark.parametrize("loss", ALL, ids=str)
def test_padding_and_order_and_micro_batches_mean_nothing(loss):
    rows, count = drawn(), 5
    losses, gradient = differentiated(loss, rows)
    assert losses.shape == (count,)
    assert gradient.isfinite().all()
    assert (gradient[~rows.mask] == 0).all()
    assert (gradient[rows.mask] != 0).any()

    order = torch.tensor([3, 0, 4, 2, 1])
    both = torch.cat([order, order + count])
    again, moved = differentiated(loss, rows.rows(both))
    torch.testing.assert_close(again, losses[order], rtol=1e-12, atol=0)
    torch.testing.assert_close(moved, gradient[both], rtol=1e-12, atol=1e-15)

    wide = {
        "logprobs": torch.nan,
        "ref_logprobs": torch.nan,
        "collisions": torch.nan,
        "mask": False,
    }
    padded = replace(
        rows, **{k: torch.nn.functional.pad(getattr(rows, k), (2, 3), value=filler) for k, filler in wide.items()}
    )
    again, stretched = differentiated(loss, padded)
    torch.testing.assert_close(again, losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(stretched[:, 2:-3], gradient, rtol=1e-12, atol=1e-15)

    if Needs.WHOLE_STEP not in loss.needs:
        singles = [differentiated(loss, rows.rows(torch.tensor([i, i + count]))) for i in range(count)]
        torch.testing.assert_close(torch.cat([found for found, _ in singles]), losses, rtol=1e-12, atol=0)
        chosen, rejected = zip(*(halves(found) for _, found in singles), strict=True)
        torch.testing.assert_close(torch.cat([*chosen, *rejected]), gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", [loss for loss in ALL if Needs.REFERENCE_TOKENS not in loss.needs], ids=str)
def test_sums_of_the_reference_do_as_well_as_its_tokens(loss):
    rows = drawn()
    sums = replace(rows, ref_logprobs=None, ref_sums=rows.ref_logps)
    torch.testing.assert_close(loss.pairs(Pairs(sums)), loss.pairs(Pairs(rows)), rtol=0, atol=0)


@pytest.mark.parametrize("loss", FREE, ids=str)
def test_losses_without_a_reference_look_at_none(loss):
    rows = drawn()
    alone = replace(rows, ref_logprobs=None)
    torch.testing.assert_close(loss.pairs(Pairs(alone)), loss.pairs(Pairs(rows)), rtol=0, atol=0)
    assert loss.rewards(alone).isfinite().all()


def test_discopop_of_a_lead_and_of_a_lag_is_exponential_and_logistic():
    """In float32 e^-x overflows at a lag of 100 and its weight is zero there; slopes of both, and the odd one at zero."""
    h = torch.tensor([1000.0, -1000.0, 20.0, -20.0, 0.0], requires_grad=True)
    losses = DiscoPOPLoss().pairs(pairs_of(h, torch.zeros(5)))
    (slopes,) = torch.autograd.grad(losses.sum(), h)
    assert losses.tolist() == pytest.approx([0.0, 100.0, math.exp(-2), math.log1p(math.exp(2)), 0.846574], abs=1e-5)
    at_zero = 0.25 / 0.05 * (1 - LN2) - 0.5 - 0.25
    expected = [0.0, -0.1, -0.1 * math.exp(-2), -0.1 / (1 + math.exp(-2)), 0.1 * at_zero]
    assert slopes.tolist() == pytest.approx(expected, abs=1e-6)


def test_dpop_charges_what_the_chosen_response_has_lost():
    """A lead of two nats, of which the chosen response has lost one itself: .1 x (2 - 5), and five more parts of its slope."""
    h = torch.tensor([-1.0, -3.0], requires_grad=True)
    loss = DPOPLoss(penalty=5.0).pairs(pairs_of(h[:1], h[1:]))
    (slopes,) = torch.autograd.grad(loss.sum(), h)
    down = 0.1 / (1 + math.exp(-0.3))
    assert loss.item() == pytest.approx(math.log1p(math.exp(0.3)), abs=1e-6)
    assert slopes.tolist() == pytest.approx([-6 * down, down], abs=1e-6)


def test_aot_of_a_step_is_not_that_of_its_parts():
    rows = drawn(seed=1)
    apart = [AOTLoss().pairs(Pairs(rows.rows(torch.tensor([i, i + 5])))) for i in range(5)]
    torch.testing.assert_close(torch.cat(apart), dpo_loss(*Pairs(rows).logratios, beta=0.1))
    assert (torch.cat(apart) - AOTLoss().pairs(Pairs(rows))).abs().max() > 0.01


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("loss", "pairs", "message"),
    [
        (DPOLoss(), TWO, "the loss reads the reference's log-probabilities, which were not computed"),
        (
            LDDPOLoss(),
            Pairs(replace(TWO.responses, ref_sums=torch.zeros(2))),
            "log-probabilities of tokens, which were",
        ),
        (WPOLoss(), pairs_of(torch.zeros(1), torch.zeros(1)), "the collision probabilities of tokens, which were not"),
    ],
)
def test_what_was_not_computed_is_named(loss, pairs, message):
    with pytest.raises(UserError, match=message):
        loss.pairs(pairs)


SMOOTHING = "label_smoothing is a flip probability in [0, 0.5), not 0.5"


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        *[
            (type(loss), {"beta": 0.0}, "beta must be positive, not 0.0")
            for loss in {type(loss): loss for loss in [*VALUES, *FREE] if hasattr(loss, "beta")}.values()
        ],
        (DPOLoss, {"beta": -0.1}, "beta must be positive, not -0.1"),
        (DPOLoss, {"beta": math.nan}, "beta must be positive, not nan"),
        (DPOLoss, {"label_smoothing": -0.1}, "label_smoothing is a flip probability in [0, 0.5), not -0.1"),
        *[(kind, {"label_smoothing": 0.5}, SMOOTHING) for kind in (DPOLoss, RobustDPOLoss, EXOLoss, AOTLoss, CPOLoss)],
        (
            EXOLoss,
            {"label_smoothing": 0.0},
            "EXO's label_smoothing must be positive: a sure label is infinitely far; 0.001 is usual",
        ),
        (IPOLoss, {"tau": 0.0}, "tau must be positive, not 0.0"),
        (DPOPLoss, {"penalty": -1.0}, "penalty must not be negative, not -1.0"),
        (DiscoPOPLoss, {"tau": -0.05}, "tau must be positive, not -0.05"),
        (LDDPOLoss, {"alpha": 1.5}, "alpha is a weight of tokens in [0, 1], not 1.5"),
        (LDDPOLoss, {"alpha": -0.5}, "alpha is a weight of tokens in [0, 1], not -0.5"),
        (AlphaDivergence, {"alpha": 0.0}, "alpha is in (0, 1), not 0.0; 0 is ForwardKL, 1 is DPOLoss"),
        (AlphaDivergence, {"alpha": 1.0}, "alpha is in (0, 1), not 1.0; 0 is ForwardKL, 1 is DPOLoss"),
        (CPOLoss, {"nll_coef": -1.0}, "nll_coef must not be negative, not -1.0"),
        (SimPOLoss, {"gamma": -0.5}, "gamma must not be negative, not -0.5"),
        (MixedLoss, {"losses": [], "weights": []}, "0 losses and 0 weights: give a weight for each loss"),
        (MixedLoss, {"losses": [DPOLoss()], "weights": [1, 2]}, "1 losses and 2 weights: give a weight for each loss"),
        (MixedLoss, {"losses": [DPOLoss()], "weights": [-1]}, "weights[0] must not be negative, not -1"),
        (
            MixedLoss,
            {"losses": [DPOLoss(), NLLLoss()], "weights": [0, 1]},
            "the first of the weights, whose loss gives the reward, must be positive, not 0",
        ),
    ],
)
def test_coefficients_without_a_meaning_are_refused_by_name(kind, settings, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        kind(**settings)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (DPOLoss, {"beta": 1e-6, "label_smoothing": 0.0}),
        (DPOLoss, {"label_smoothing": 0.499}),
        (RobustDPOLoss, {"label_smoothing": 0.0}),
        (LDDPOLoss, {"alpha": 0.0}),
        (AlphaDivergence, {"alpha": 0.001}),
        (SimPOLoss, {"gamma": 0.0}),
        (CPOLoss, {"nll_coef": 0.0}),
        (FDPOLoss, {"divergence": ForwardKL()}),
        (MixedLoss, {"losses": [DPOLoss(), NLLLoss()], "weights": [1, 0]}),
    ],
)
def test_coefficients_at_the_edge_of_their_range_are_taken(kind, settings):
    loss = kind(**settings)
    assert {name: getattr(loss, name) for name in settings} == settings
