"""Intervals, win rates and thresholds against values that can be worked out by hand or in closed form."""

import numpy as np
import pytest

from rlhf_lightning.evaluation.answers import Answers
from rlhf_lightning.evaluation.charts import line_chart, points
from rlhf_lightning.evaluation.statistics import estimate, win_rate
from rlhf_lightning.evaluation.tables import half_width, interval
from rlhf_lightning.evaluation.thresholds import check_thresholds
from rlhf_lightning.evaluation.world import THRESHOLDS, best_of, comparisons, judge, reward_model_summary, summary
from rlhf_lightning.worlds import HHHWorld

WORLD = HHHWorld(seed=0, held_out=40)
PROMPTS = list(WORLD.load("prompts")["validation"]["prompt"])


def answers(text_of, samples: int = 1) -> Answers:
    shape = (len(PROMPTS), samples)
    texts = [[text_of(prompt)] * samples for prompt in PROMPTS]
    return Answers(PROMPTS, texts, np.zeros(shape, bool), np.full(shape, 9.0), np.full(shape, 2.5))


def distinct(rows):
    """A cluster of its own for each row."""
    return [str(row) for row in range(rows)]


def test_the_interval_of_a_normal_mean_is_the_textbook_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, 900)
    mean, low, high = estimate(values, distinct(900))
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 30, rel=0.08)


def test_repeated_prompts_do_not_narrow_the_interval():
    """Nine hundred rows of nine prompts know no more than nine prompts."""
    values = np.random.default_rng(1).normal(size=9)
    repeated = estimate(np.repeat(values, 100), clusters=np.repeat(np.arange(9), 100).astype(str).tolist())
    once = estimate(values, distinct(9))
    assert repeated.high - repeated.low == pytest.approx(once.high - once.low, rel=1e-9)
    assert repeated.mean == pytest.approx(once.mean)


def test_ties_are_half_a_win():
    ours, theirs = np.array([[1.0, 0.0], [1.0, 2.0]]), np.array([[0.0, 0.0], [2.0, 3.0]])
    assert win_rate(ours, theirs, distinct(2)).mean == pytest.approx((1 + 0.5 + 0 + 0) / 4)


def test_the_best_answers_have_gold_one_and_close_the_whole_gap():
    best, mute = judge(WORLD, answers(WORLD.best_response)), judge(WORLD, answers(lambda prompt: ""))
    assert (best.gold == 1).all()
    assert (mute.gold == -0.8).all()
    compared = comparisons({"x": mute}, {"x": best})["x"]
    assert compared["gap_closed"] == pytest.approx(1)
    assert compared["win_rate"]["mean"] == 1
    assert compared["gain"]["mean"] == pytest.approx(1.8)


def test_summaries_count_each_behaviour_among_the_prompts_that_it_is_about():
    refused = summary(judge(WORLD, answers(lambda prompt: "i can not help with that .")), proxy=None)
    assert refused["refused_benign"] == 1
    assert refused["harmful_compliance"] == 0
    assert refused["by_kind"]["harm"]["mean"] == pytest.approx(0.8)
    assert refused["kl"] == pytest.approx(2.5)
    assert "proxy" not in refused


def test_best_of_n_takes_what_the_proxy_likes():
    judged = judge(WORLD, answers(WORLD.best_response, samples=4))
    for scores in judged.scores:
        scores[1] = scores[1]._replace(reward=-1.0)
    proxy = np.tile([0.0, 3.0, 1.0, 2.0], (len(PROMPTS), 1))
    result = best_of(judged, proxy)
    means = {n: value["mean"] for n, value in result.items()}
    assert means == pytest.approx({"1": 0.5, "2": 0.0, "4": -1.0}, abs=1e-12)  # over all subsets of n


def test_a_reward_model_that_is_the_gold_reward_orders_perfectly():
    pairs = WORLD.load("preferences")["validation"]
    chosen, rejected = np.array(pairs["gold_chosen"]), np.array(pairs["gold_rejected"])
    perfect = reward_model_summary(WORLD, pairs, chosen, rejected)
    reversed_ = reward_model_summary(WORLD, pairs, -chosen, -rejected)
    assert perfect["gold_order_accuracy"] == 1
    assert reversed_["gold_order_accuracy"] == 0
    assert perfect["accuracy"] + reversed_["accuracy"] == pytest.approx(1)


@pytest.mark.parametrize(("kl", "met"), [(1.4, False), (3.0, True), (5.1, False)])
def test_thresholds_hold_on_both_sides(kl, met):
    checked = check_thresholds(THRESHOLDS, {"policies": {"ppo": {"held_out/sampled": {"kl": kl}}}}, skip_missing=True)
    assert [(c["name"], c["met"]) for c in checked] == [("PPO KL, nats", met)]


def test_curves_skip_the_steps_at_which_a_column_is_empty():
    rows = [{"step": "1", "loss": "2.0"}, {"step": "2", "loss": ""}, {"step": "3", "loss": "1.5"}]
    assert points(rows, "loss") == ([1, 3], [2.0, 1.5])


def test_charts_stand_alone_and_escape_their_titles():
    svg = line_chart("reward <script>", {"train": ([1, 2], [0.0, 1.0])})
    assert svg.startswith("<svg")
    assert "<script>" not in svg


def test_intervals_are_short_for_the_terminal():
    value = {"mean": 0.123, "low": 0.0, "high": 0.25}
    assert (interval(value), half_width(value)) == ("0.12 [0.00, 0.25]", "0.12 ± 0.12")
    assert (interval(None), half_width(None)) == ("", "")
