"""PPO against TRL 1.12.0, the last with PPO, where the two are equal.

Two passes by plain gradient descent: the first at ratio 1, the second with both clips at work.
"""

import pytest

from tests.peers.measure import apart, distance
from tests.peers.reading import EARLY, MONTE_CARLO, masked, our_rewards, processed_scores, tensor

TOLERANCE = 1e-5
FULL = ["ppo-full-llama", "ppo-full-gpt2", "ppo-full-whitened"]


# ---------------------------------------------------------------- the rollout


@pytest.mark.parametrize("name", [*FULL, EARLY, MONTE_CARLO])
def test_the_rollout_is_theirs(online, ours, name):
    theirs, rollout = online(name), ours(name)["rollout"]
    mask = rollout["response_mask"]
    assert rollout["input_ids"].tolist() == theirs["rollout"]["query_responses"]
    assert mask.tolist() == (~tensor(theirs["rollout"]["padding_mask"])).tolist()
    for key in ("logprobs", "ref_logprobs", "values"):
        assert apart(masked(theirs, key, mask), rollout[key]) < TOLERANCE, key
    assert apart(theirs["rollout"]["scores"], processed_scores(rollout)) < TOLERANCE
    log_ratio = rollout["logprobs"] - rollout["ref_logprobs"]
    assert (
        apart(theirs["rollout"]["kl"], log_ratio) < TOLERANCE
    )  # they fill both with 1.0 on padding: no difference there
    assert log_ratio.abs().max() > 1


# ---------------------------------------------------------------- responses that fill the buffer: all is equal


def test_rewards_of_full_responses_are_theirs(online, ours):
    assert apart(online(FULL[0])["rollout"]["rewards"], our_rewards(ours(FULL[0])["rollout"])) < TOLERANCE


@pytest.mark.parametrize("name", FULL)
def test_advantages_and_returns_of_full_responses_are_theirs(online, ours, name):
    theirs, rollout = online(name)["rollout"], ours(name)["rollout"]
    assert apart(theirs["returns"], rollout["returns"]) < TOLERANCE
    assert apart(theirs["advantages"], rollout["advantages"]) < TOLERANCE


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("number", [0, 1])
def test_losses_and_gradients_on_full_responses_are_theirs(online, ours, name, number):
    """They were given max_grad_norm 1e-3 and we 1e9: their trainer never clips, or the second pass would differ."""
    theirs, mine = online(name), ours(name)["passes"][number]
    update, means = theirs["updates"][number], mine["means"]
    assert means["loss/policy_avg"] == pytest.approx(update["pg_loss"], abs=TOLERANCE)
    assert means["loss/value_avg"] == pytest.approx(update["vf_loss"], abs=TOLERANCE)
    assert means["policy/entropy_avg"] == pytest.approx(float(tensor(update["entropy"]).mean()), abs=TOLERANCE)
    for role in ("policy", "critic"):
        assert distance(theirs["gradients"][number][role], mine["gradients"][role]) < TOLERANCE, role


@pytest.mark.parametrize("name", FULL)
def test_metrics_of_full_responses_are_theirs(online, ours, name):
    theirs, mine = online(name)["metrics"], ours(name)["metrics"]
    same = (
        "objective/kl", "objective/non_score_reward", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg",
        "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "val/ratio",
    )  # fmt: skip
    assert {key: mine[key] for key in same} == pytest.approx({key: theirs[key] for key in same}, abs=TOLERANCE)
    assert min(theirs["policy/clipfrac_avg"], theirs["val/clipfrac_avg"]) > 0.1


# ---------------------------------------------------------------- with lambda 1 it does not matter where the score stands


def test_with_lambda_1_advantages_and_returns_are_theirs(online, ours):
    theirs, rollout = online(MONTE_CARLO), ours(MONTE_CARLO)["rollout"]
    mask = rollout["response_mask"]
    assert apart(masked(theirs, "returns", mask), rollout["returns"]) < TOLERANCE
    assert apart(theirs["rollout"]["advantages"], rollout["advantages"]) < TOLERANCE


@pytest.mark.parametrize("number", [0, 1])
def test_with_lambda_1_the_policy_learns_the_same(online, ours, number):
    theirs, mine = online(MONTE_CARLO), ours(MONTE_CARLO)["passes"][number]
    assert mine["means"]["loss/policy_avg"] == pytest.approx(theirs["updates"][number]["pg_loss"], abs=TOLERANCE)
    assert distance(theirs["gradients"][number]["policy"], mine["gradients"]["policy"]) < TOLERANCE
