"""PPO against TRL 1.12.0 where the two differ: by exactly what the test's name says."""

import pytest
import torch

from rlhf_lightning.functional.advantages import whiten
from tests.peers import cases, ours_ppo
from tests.peers.measure import apart, distance, gradients
from tests.peers.problem import PROMPTS, WIDTH
from tests.peers.reading import EARLY, MONTE_CARLO, masked, our_rewards, tail, tensor

TOLERANCE = 1e-5
FULL = "ppo-full-llama"


# ---------------------------------------------------------------- responses that end early: the score's place


def test_their_score_stands_one_slot_after_eos(online, ours):
    theirs, rollout = online(EARLY), ours(EARLY)["rollout"]
    ended, column, scores, _ = tail(theirs, rollout["response_mask"])
    assert ended.sum() == 6
    moved, rows = our_rewards(rollout), torch.arange(len(PROMPTS))[ended]
    moved[rows, column[ended]] -= scores[ended]
    moved[rows, column[ended] + 1] += scores[ended]
    assert apart(theirs["rollout"]["rewards"], moved) < TOLERANCE


def test_their_returns_lack_a_share_of_what_the_critic_missed(online, ours):
    """Ours - theirs = lambda^(T-t) (1 - lambda) (score - value after EOS) at t <= T, the column of EOS."""
    theirs, rollout = online(EARLY), ours(EARLY)["rollout"]
    mask, lam = rollout["response_mask"], cases.ONLINE[EARLY].gae_lambda
    ended, column, scores, values = tail(theirs, mask)
    steps = column[:, None] - torch.arange(WIDTH)
    missing = (lam**steps * (1 - lam) * (scores - values)[:, None]).masked_fill(~mask | ~ended[:, None], 0)
    assert apart(rollout["returns"] - masked(theirs, "returns", mask), missing) < TOLERANCE
    assert missing.abs().max() > 0.05


def test_whitening_is_theirs(online, ours):
    theirs, mask = online(EARLY), ours(EARLY)["rollout"]["response_mask"]
    raw = masked(theirs, "returns", mask) - masked(theirs, "values", mask)
    assert apart(theirs["rollout"]["advantages"], whiten(raw, mask)) < TOLERANCE


def test_their_rewards_are_whitened_with_the_slot_after_eos(online, ours):
    """The score is in that slot, so that the slot counts: six more numbers than there are tokens."""
    plain, theirs, mask = online(EARLY), online("ppo-early-whitened"), ours(EARLY)["rollout"]["response_mask"]
    wider = ~tensor(theirs["rollout"]["padding_mask_p1"])
    assert int(wider.sum() - mask.sum()) == 6
    whitened = whiten(tensor(plain["rollout"]["rewards"]), wider, keep_mean=True)
    assert apart(theirs["rollout"]["rewards"], whitened) < TOLERANCE
    assert (
        apart(masked(theirs, "rewards", mask), whiten(our_rewards(ours(EARLY)["rollout"]), mask, keep_mean=True)) > 0.1
    )


# ---------------------------------------------------------------- with lambda 1 advantages are equal, the rest is not


def test_their_critic_also_learns_the_slot_after_eos(online, ours, paths):
    """Mean over N tokens and E slots there, over N tokens here; the slot's error is (value - score)^2 / 2."""
    theirs, mine = online(MONTE_CARLO), ours(MONTE_CARLO)
    mask = mine["rollout"]["response_mask"]
    ended, _, scores, values = tail(theirs, mask)
    module = ours_ppo.build(cases.ONLINE[MONTE_CARLO], paths["llama"])
    read = ours_ppo.tail_values(module, mine["rollout"])
    assert apart(values[ended], read[ended].detach()) < TOLERANCE
    extra = (0.5 * (read - scores).square() * ended).sum()
    tokens, slots = int(mask.sum()), int(ended.sum())
    both = (mine["passes"][0]["means"]["loss/value_avg"] * tokens + float(extra)) / (tokens + slots)
    assert both == pytest.approx(theirs["updates"][0]["vf_loss"], abs=TOLERANCE)
    (cases.VALUE_COEF * extra).backward()
    network = module.actor_critic.critic.network
    more, found = gradients(network), mine["passes"][0]["gradients"]["critic"]
    for name, numbers in theirs["gradients"][0]["critic"].items():
        expected = (tensor(found[name]) * tokens + tensor(more[name])) / (tokens + slots)
        assert apart(numbers[1:], expected[1:]) < TOLERANCE * numbers[0], name  # projections add up, norms do not


def test_their_ratio_kl_and_entropy_are_means_over_padding_too(online, ours):
    theirs, mine = online(MONTE_CARLO)["updates"][1], ours(MONTE_CARLO)
    mask, means = mine["rollout"]["response_mask"], mine["passes"][1]["means"]
    share = float(mask.float().mean())
    assert share == pytest.approx(30 / 48)
    ratio, entropy = tensor(theirs["ratio"]), tensor(theirs["entropy"])
    assert means["val/ratio"] * share + 1 - share == pytest.approx(float(ratio.mean()), abs=TOLERANCE)
    shuffled = mask[tensor(theirs["micro_batch_inds"])]
    assert means["policy/entropy_avg"] == pytest.approx(float(entropy[shuffled].mean()), abs=TOLERANCE)
    logged, updates = online(MONTE_CARLO)["metrics"], online(MONTE_CARLO)["updates"]
    assert logged["val/ratio"] == pytest.approx(
        sum(float(tensor(u["ratio"]).mean()) for u in updates) / 2, abs=TOLERANCE
    )
    every_slot = sum(float(tensor(u["entropy"]).mean()) for u in updates) / 2
    assert logged["policy/entropy_avg"] == pytest.approx(every_slot, abs=TOLERANCE)
    assert logged["policy/approxkl_avg"] == pytest.approx(mine["metrics"]["policy/approxkl_avg"] * share, abs=TOLERANCE)


# ---------------------------------------------------------------- several micro-batches


def test_their_losses_are_means_of_micro_batch_means(online, ours, paths):
    """Half the sum of two token means there; the mean over all tokens here, whatever the micro-batch size."""
    theirs = online("ppo-early-accumulated")
    assert len(theirs["gradients"]) == 2  # optimizer steps
    halves = theirs["updates"][:2]
    module, rollout = rebuilt(ours(MONTE_CARLO), paths)
    for half in halves:
        rows = rollout.rows(tensor(half["micro_batch_inds"]))
        loss, _ = module._micro_loss(rows)
        (loss / rows.response_mask.sum() / 2).backward()
        module.update_means.reset()
    found = gradients(module.actor_critic.policy.network)
    assert distance(theirs["gradients"][0]["policy"], found) < TOLERANCE
    assert distance(theirs["gradients"][0]["policy"], ours(MONTE_CARLO)["passes"][0]["gradients"]["policy"]) > 0.05
    tokens = [int(rollout.response_mask[tensor(half["micro_batch_inds"])].sum()) for half in halves]
    assert tokens[0] != tokens[1]
    weighted = sum(n * half["pg_loss"] for n, half in zip(tokens, halves, strict=True)) / sum(tokens)
    assert weighted == pytest.approx(ours(MONTE_CARLO)["passes"][0]["means"]["loss/policy_avg"], abs=TOLERANCE)


def test_on_a_loaders_last_batch_they_do_not_accumulate(online, ours, paths):
    """Every micro-batch is an optimizer step there, with its share of the gradient and at the weights that the last left."""
    theirs = online("ppo-early-accumulated-last")
    assert len(theirs["gradients"]) == 4
    module, rollout = rebuilt(ours(MONTE_CARLO), paths)
    rows = rollout.rows(tensor(theirs["updates"][0]["micro_batch_inds"]))
    loss, _ = module._micro_loss(rows)
    (loss / rows.response_mask.sum() / 2).backward()
    assert distance(theirs["gradients"][0]["policy"], gradients(module.actor_critic.policy.network)) < TOLERANCE
    assert apart(theirs["updates"][1]["ratio"], torch.ones(4, WIDTH)) > 0.1


def rebuilt(mine, paths):
    """Our module before its first step, and what it learnt from."""
    module = ours_ppo.build(cases.ONLINE[MONTE_CARLO], paths["llama"])
    return module, ours_ppo.Rollout(**mine["rollout"])


# ---------------------------------------------------------------- metrics of one name and two meanings


def test_metrics_that_mean_something_else(online, ours):
    theirs, mine, rollout = online(FULL)["metrics"], ours(FULL)["metrics"], ours(FULL)["rollout"]
    # Theirs is what the sampled tokens say of the entropy, ours that of the distributions.
    assert theirs["objective/entropy"] == pytest.approx(-float(rollout["logprobs"].sum(1).mean()), abs=1e-4)
    assert mine["objective/entropy"] == pytest.approx(float(rollout["entropy"].sum(1).mean()), abs=1e-4)
    # Theirs holds the penalty for a missing EOS.
    penalty = cases.MISSING_EOS_PENALTY * float(rollout["truncated"].float().mean())
    for name in ("objective/scores", "objective/rlhf_reward"):
        assert mine[name] - theirs[name] == pytest.approx(penalty, abs=TOLERANCE)
    # A count there, a share here; a variance of two passes' means there, of all tokens' ratios here.
    assert theirs["val/num_eos_tokens"] == mine["val/num_eos_tokens"] * len(PROMPTS)
    ratios = torch.tensor([one["means"]["val/ratio"] for one in ours(FULL)["passes"]])
    assert theirs["val/ratio_var"] == pytest.approx(float(ratios.var()), abs=TOLERANCE)
