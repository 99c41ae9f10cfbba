"""The envelope against closed forms, and what a leaderboard makes of the reports of several seeds."""

import json
import math

import numpy as np
import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.leaderboard import attainable, envelope, leaderboard, write_leaderboard
from rlhf_lightning.functional.optimum import exact_kl, expected, kl_optimum


def test_the_envelope_is_the_optimum_of_the_samples_own_distribution():
    rewards = np.random.default_rng(0).normal(size=(5, 16))
    betas = np.array([10.0, 1.0, 0.3])
    kls, best = envelope(rewards, betas)
    table, uniform = torch.tensor(rewards), torch.full((5, 16), -math.log(16), dtype=torch.float64)
    for beta, kl, gold in zip(betas, kls, best, strict=True):
        optimum, _ = kl_optimum(uniform, table, beta=float(beta))
        assert kl == pytest.approx(float(exact_kl(optimum, uniform).mean()), abs=1e-9)
        assert gold == pytest.approx(float(expected(optimum, table).mean()), abs=1e-9)


def test_the_ends_of_the_envelope_are_the_mean_and_the_best_of_all_samples():
    rewards = np.array([[0.0, 1.0], [2.0, 5.0]])
    (far, near), (mean, best) = envelope(rewards, np.array([1e6, 1e-3]))
    assert (far, mean) == pytest.approx((0.0, 2.0), abs=1e-5)
    assert (near, best) == pytest.approx((math.log(2), 3.0), abs=1e-5)
    assert attainable({"kl": [0.0, math.log(2)], "gold": [2.0, 3.0]}, math.log(2) / 2) == pytest.approx(2.5)
    assert attainable({"kl": [0.0, math.log(2)], "gold": [2.0, 3.0]}, 9.0) == 3.0


def report(seed, **gold):
    where = {
        name: {
            "held_out/sampled": {"gold": {"mean": value, "low": value - 0.05, "high": value + 0.05}, "kl": 1.0 + seed}
        }
        for name, value in gold.items()
    }
    return {
        "seed": seed,
        "policies": where,
        "seconds": dict.fromkeys(gold, 10.0 * seed**2),
        "envelope": {"kl": [0.0, 1.0, 9.0], "gold": [0.0, 0.5, 0.5]},
    }


def test_means_and_intervals_over_seeds_by_hand(tmp_path):
    board = leaderboard([report(1, sft=0.0, ppo=0.40), report(2, sft=0.1, ppo=0.46), report(3, sft=0.2, ppo=0.52)])
    ppo = board["methods"]["ppo"]
    assert ppo["gold"]["mean"] == pytest.approx(0.46)
    assert ppo["gold"]["half"] == pytest.approx(4.303 * 0.06 / math.sqrt(3))
    assert ppo["kl"]["mean"] == pytest.approx(3.0)
    assert ppo["seconds"] == 40.0
    assert not ppo["above_envelope"]  # .52 is within its own interval of .5
    picture = write_leaderboard(board, tmp_path)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "leaderboard.json").read_text())["seeds"] == [1, 2, 3]
    assert (tmp_path / "leaderboard.md").read_text().splitlines()[2] == "| ppo | 0.46 ± 0.15 | 3.00 | 40 |"


def test_a_method_above_the_envelope_is_told():
    board = leaderboard([report(1, ppo=0.7)])
    assert board["methods"]["ppo"]["above_envelope"]
    assert board["methods"]["ppo"]["gold"] == {"mean": 0.7, "half": 0.0}


def test_seeds_with_other_policies_are_no_leaderboard():
    with pytest.raises(UserError, match="other policies"):
        leaderboard([report(1, ppo=0.1), report(2, dpo=0.1)])
