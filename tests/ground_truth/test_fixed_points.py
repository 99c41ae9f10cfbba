"""The exact expectations behind the table of fixed points, and what the command makes of figures that do not hold."""

import json

import pytest
import torch

from rlhf_lightning.cli import main
from rlhf_lightning.evaluation import fixed_points
from rlhf_lightning.evaluation.expected_updates import REINFORCEMENT, Pairs, kto, over_halves, over_pairs
from rlhf_lightning.evaluation.fixed_points import Figure, preference_figures, reinforcement_figures
from rlhf_lightning.evaluation.tabular import Descent, Problem, Standing, distance
from rlhf_lightning.functional.implicit_rewards import apo_zero_loss
from rlhf_lightning.functional.optimum import exact_kl, objective
from rlhf_lightning.functional.unpaired import kto_loss

SMALL = Problem(tokens=3, length=2, prompts=2, seed=5)


def standing(problem, seed=0):
    """A policy that is not the reference."""
    ref_logits, rewards = problem.draw()
    noise = torch.randn(ref_logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits = (ref_logits + 0.5 * noise).requires_grad_()
    return logits, Standing(problem.token_logps(logits), problem.token_logps(ref_logits), rewards, problem.beta)


def test_responses_are_written_out_and_their_probabilities_sum_to_one():
    logits, at = standing(SMALL)
    assert at.logps.shape == (2, 9, 2)
    assert at.logps.sum(2).exp().sum(1).tolist() == pytest.approx([1, 1], abs=1e-12)
    rows = logits.log_softmax(2)
    for first in range(3):
        for second in range(3):
            expected = [rows[1, 0, first].item(), rows[1, 1 + first, second].item()]
            assert at.logps[1, 3 * first + second].tolist() == pytest.approx(expected, abs=1e-12)


EXACT = ["k1 in the reward", "k2 in the loss, of sequences", "weighted k3 in the loss, of sequences"]


@pytest.mark.parametrize("name", REINFORCEMENT)
def test_which_updates_are_the_gradient_of_the_objective(name):
    logits, at = standing(SMALL)
    exact = -objective(at.logps.sum(2), at.ref_logps.sum(2), at.rewards, beta=at.beta).sum()
    (wanted,) = torch.autograd.grad(exact, logits, retain_graph=True)
    (found,) = torch.autograd.grad(REINFORCEMENT[name](at), logits)
    error = float((found - wanted).norm() / wanted.norm())
    if name in ("exact gradient", *EXACT):
        assert error < 1e-12
    else:
        assert error > 1e-3


def test_k3_in_the_loss_has_the_gradient_of_the_other_kl_where_a_response_is_one_token():
    problem = Problem(tokens=5, length=1, seed=2)
    logits, at = standing(problem)
    logps, ref_logps = at.logps.sum(2), at.ref_logps.sum(2)
    other = -(logps.exp() * at.rewards).sum() + at.beta * exact_kl(ref_logps, logps).sum()
    (wanted,) = torch.autograd.grad(other, logits, retain_graph=True)
    (found,) = torch.autograd.grad(REINFORCEMENT["k3 in the loss, of tokens"](at), logits)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rivals", ["reference", "uniform"])
def test_pairs_are_drawn_and_labelled_as_they_say(rivals):
    ref_logits, rewards = SMALL.draw()
    p = (
        SMALL.token_logps(ref_logits).sum(2).exp()
        if rivals == "reference"
        else torch.full((2, 9), 1 / 9, dtype=torch.float64)
    )
    weights = Pairs(rivals, flipped=0.2).weights(SMALL)
    for chosen, rejected in ((0, 4), (4, 0), (7, 7)):
        wins = torch.sigmoid(rewards[1, chosen] - rewards[1, rejected])
        share = 2 * p[1, chosen] * p[1, rejected] * (0.8 * wins + 0.2 * (1 - wins))  # of two orders, one is the label
        assert weights[1, chosen, rejected].item() == pytest.approx(share.item(), rel=1e-9)
    assert weights.sum(dim=(1, 2)).tolist() == pytest.approx([1, 1], abs=1e-12)


def test_halves_of_pairs_are_the_pairs_where_a_loss_knows_no_pair():
    """APO-zero is KTO at a reference point of zero, on each side of a pair."""
    _, at = standing(SMALL)
    weights = Pairs().weights(SMALL)

    def rows(at, liked, disliked):
        yes = torch.ones_like(liked, dtype=torch.bool)
        good, bad = (kto_loss(at.ratios, which, torch.zeros(()).double(), beta=0.5) for which in (yes, ~yes))
        return (liked * good + disliked * bad).sum()

    paired = over_pairs(weights, lambda *pair: apo_zero_loss(*pair, beta=0.5))(at)
    assert over_halves(weights, rows)(at).item() == pytest.approx(paired.item(), rel=1e-12)
    assert abs(over_halves(weights, kto)(at).item() - paired.item()) > 1e-5


def test_exact_methods_find_the_optimum_of_any_problem_and_others_do_not():
    found = {
        (f.method, f.where): f.found
        for f in [
            *reinforcement_figures(Problem(tokens=4, length=1, seed=11), Descent(steps=700), 0),
            *preference_figures(Problem(tokens=3, length=2, seed=11), Descent(steps=700)),
        ]
    }
    for name in (*EXACT, "exact gradient", "k2 in the loss, of tokens"):
        assert abs(found[name, "1 token"]) < 1e-9, name
    assert found["k3 in the loss, of tokens: to beta ref / (lambda - r)", "1 token"] < 1e-6
    assert found["k3 in the loss, of tokens", "1 token"] > 0.01
    for rivals in ("reference", "uniform"):
        for name in ("DPO", "robust DPO, flipped labels"):
            assert abs(found[name, f"pairs, {rivals}"]) < 1e-9, name
        assert found["IPO: to its closed form", f"pairs, {rivals}"] < 1e-6
        same = found["cDPO, clean labels", f"pairs, {rivals}"], found["DPO, flipped labels", f"pairs, {rivals}"]
        assert same[0] == pytest.approx(same[1], rel=1e-6)
        assert min(found[name, f"pairs, {rivals}"] for name in ("IPO", "KTO", "APO-zero", "hinge")) > 1e-3


def test_distance_is_zero_at_the_optimum_alone():
    ref_logits, rewards = SMALL.draw()
    ref = SMALL.token_logps(ref_logits).sum(2)
    optimum = (ref + rewards / SMALL.beta).log_softmax(1)
    assert distance(SMALL, optimum) == pytest.approx(0, abs=1e-12)
    assert distance(SMALL, ref) > 0.1


@pytest.mark.parametrize(
    ("found", "on_record", "exact", "holds"),
    [(0.2, 0.168, False, True), (0.21, 0.168, False, False), (0.13, 0.168, False, False), (1e-12, 1e-16, True, True),
     (1e-4, 9e-5, True, False), (float("nan"), 0.5, False, False)],
)  # fmt: skip
def test_a_figure_holds_within_its_tolerance(found, on_record, exact, holds):
    assert Figure("m", "w", found, on_record, exact).holds(0.2) is holds


CONFIG = """
one_token: {seed: 0}
three_tokens: {length: 3}
pairs: {length: 2}
"""


def test_the_command_ends_with_one_if_a_figure_does_not_hold(tmp_path, monkeypatch, capsys):
    good, bad = Figure("good", "here", 0.5, 0.5, False), Figure("bad", "there", 1.0, 0.5, False)
    monkeypatch.setattr("rlhf_lightning.commands.fixed_points.reinforcement_figures", lambda *_: [good])
    monkeypatch.setattr("rlhf_lightning.commands.fixed_points.preference_figures", lambda *_: [bad])
    config = tmp_path / "small.yaml"
    config.write_text(CONFIG)
    with pytest.raises(SystemExit) as exit_:
        main(["fixed-points", "-c", str(config), "--output", str(tmp_path / "out")])
    assert exit_.value.code == 1
    out = capsys.readouterr().out
    assert "| bad | there | 1 | 0.5 | 2.00 | DOES NOT HOLD |" in out
    assert "2 of 3 hold; the farthest is off by 100%" in out
    assert len(json.loads((tmp_path / "out" / "fixed_points.json").read_text())) == 3
    with pytest.raises(SystemExit) as exit_:
        main(["fixed-points", "-c", str(config), "--pairs.tokens", "4"])
    assert exit_.value.code == 2
    assert "pairs: figures are on record for 8 tokens" in capsys.readouterr().err
    assert fixed_points.EXACT < 1e-6
