"""GRPO, its relatives and RLOO against TRL 1.16.0: equal, or apart by exactly what is named.

Two passes by plain gradient descent: the first at ratio 1, the second with every bound at work.
"""

import pytest
import torch

from tests.peers.group_cases import ENTROPY_COEF, EQUAL, GROUPS, SIZE, TWO_SIDED
from tests.peers.measure import apart, distance

TOLERANCE = 1e-5
PASSES = pytest.mark.parametrize("number", [0, 1])
# One ratio a response: their shares are of responses, ours of tokens.
PER_RESPONSE = ["gspo", "rloo", "rloo-accumulated"]
CLIPS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
ROLLOUT = (
    "reward", "frac_reward_zero_std", "completions/mean_length", "completions/min_length", "completions/max_length",
    "completions/clipped_ratio", "completions/mean_terminated_length", "completions/min_terminated_length",
    "completions/max_terminated_length",
)  # fmt: skip


def our_advantages(rollout):
    return rollout["advantages"][:, 0]  # a response's tokens share it


# ---------------------------------------------------------------- equal


@pytest.mark.parametrize("name", GROUPS)
def test_rollout_and_advantages_are_theirs(offline, ours, name):
    theirs, rollout = offline(name)["rollout"], ours(name)["rollout"]
    mask = rollout["response_mask"]
    width = mask.shape[1]
    assert rollout["input_ids"][:, -width:].tolist() == theirs["completion_ids"]
    left_out = rollout["truncated"] if GROUPS[name].mask_truncated else torch.zeros(len(mask), dtype=torch.bool)
    assert (mask & ~left_out[:, None]).long().tolist() == theirs["completion_mask"]
    assert apart(theirs["advantages"], our_advantages(rollout)) < TOLERANCE
    if name == "grpo-gpt2":  # see below
        return
    if "old_logps" in theirs:
        assert apart(theirs["old_logps"], rollout["logprobs"].sum(1)) < TOLERANCE
    else:
        assert apart(theirs["old_per_token_logps"], rollout["logprobs"].masked_fill(left_out[:, None], 0)) < TOLERANCE
    if "ref_per_token_logps" in theirs:
        assert apart(theirs["ref_per_token_logps"], rollout["ref_logprobs"]) < TOLERANCE


@PASSES
@pytest.mark.parametrize("name", EQUAL)
def test_loss_and_gradients_are_theirs(offline, ours, name, number):
    theirs, mine = offline(name)["passes"][number], ours(name)["passes"][number]
    assert mine["loss"] == pytest.approx(theirs["loss"], abs=TOLERANCE)
    # The second pass begins where a large step led, with the rounding of the first; RLOO's ratio is of sums of thirty nats.
    rounding = TOLERANCE * (5 if number else 1)
    assert distance(theirs["gradients"], mine["gradients"]) < rounding
    assert mine["means"]["grad_norm"] == pytest.approx(theirs["metrics"]["grad_norm"], rel=TOLERANCE)
    assert theirs["metrics"]["grad_norm"] > 0.01


@PASSES
@pytest.mark.parametrize("name", [name for name in EQUAL if EQUAL[name].micro_batches == 1])
def test_what_is_logged_of_a_pass_is_theirs(offline, ours, name, number):
    theirs, mine = offline(name)["passes"][number]["metrics"], ours(name)["passes"][number]["means"]
    assert mine["entropy"] == pytest.approx(theirs["entropy"], abs=TOLERANCE)
    if name not in (*PER_RESPONSE, "cispo", "two-sided"):
        assert {key: mine[key] for key in CLIPS} == pytest.approx({key: theirs[key] for key in CLIPS}, abs=TOLERANCE)
        assert number == 0 or theirs["clip_ratio/region_mean"] > 0.1


@pytest.mark.parametrize("name", GROUPS)
def test_what_is_logged_of_the_rollout_is_theirs(offline, ours, name):
    theirs, mine = offline(name)["passes"][0]["metrics"], ours(name)["metrics"]
    assert {key: mine[key] for key in ROLLOUT} == pytest.approx({key: theirs[key] for key in ROLLOUT}, abs=TOLERANCE)


def test_their_kl_is_ours_before_the_first_step(offline, ours):
    """k3 a token; ours is that of the rollout, theirs follows the policy through the passes."""
    first, second = (one["metrics"]["kl"] for one in offline("grpo-llama")["passes"])
    assert ours("grpo-llama")["metrics"]["kl"] == pytest.approx(first, rel=TOLERANCE)
    assert abs(second - first) > 0.01


# ---------------------------------------------------------------- apart


def test_their_grpo_divides_by_responses_that_are_left_out(offline, ours):
    """A mean over all eight, of which one counts nothing; ours is over the seven that count."""
    theirs, mine = offline("grpo-truncated")["passes"][0], ours("grpo-truncated")["passes"][0]
    assert ours("grpo-truncated")["rollout"]["truncated"].sum() == 1
    assert abs(theirs["loss"]) > 0.01
    assert mine["loss"] == pytest.approx(theirs["loss"] * 8 / 7, abs=TOLERANCE)
    scaled = {name: [x * 8 / 7 for x in numbers] for name, numbers in theirs["gradients"].items()}
    assert distance(scaled, mine["gradients"]) < TOLERANCE


def test_their_entropy_bonus_is_a_mean_over_tokens_whatever_the_loss_is(offline, ours):
    """Ours is aggregated as the loss is, here over responses; for a token mean they are equal (``dapo``)."""
    theirs, mine = offline("grpo-entropy")["passes"][0], ours("grpo-entropy")["passes"][0]
    rollout = ours("grpo-entropy")["rollout"]
    entropy, mask = rollout["entropy"], rollout["response_mask"]
    of_tokens = float(entropy[mask].mean())
    of_responses = float((entropy.masked_fill(~mask, 0).sum(1) / mask.sum(1)).mean())
    assert abs(of_tokens - of_responses) > 0.01
    difference = ENTROPY_COEF * (of_tokens - of_responses)
    assert mine["loss"] - theirs["loss"] == pytest.approx(difference, abs=TOLERANCE)


def test_their_bnpo_is_a_mean_of_micro_batch_means(offline, ours):
    """At ratio 1 a token's loss is minus its advantage. Ours is over the tokens of the step, as their ``dapo`` is."""
    theirs, mine = offline("bnpo-accumulated")["passes"][0], ours("bnpo-accumulated")["passes"][0]
    assert len(theirs["batches"]) == 4
    sums, counts = zip(*(micro_batch(batch) for batch in theirs["batches"]), strict=True)
    assert theirs["loss"] == pytest.approx(sum(s / n for s, n in zip(sums, counts, strict=True)) / 4, abs=TOLERANCE)
    assert mine["loss"] == pytest.approx(sum(sums) / sum(counts), abs=TOLERANCE)
    assert abs(mine["loss"] - theirs["loss"]) > 1e-3
    assert mine["loss"] == pytest.approx(ours("bnpo")["passes"][0]["loss"], abs=TOLERANCE)


def micro_batch(batch):
    pairs = zip(batch["advantages"], batch["lengths"], strict=True)
    return -sum(advantage * length for advantage, length in pairs), sum(batch["lengths"])


@pytest.mark.parametrize("name", ["grpo-llama", "grpo-batch-std", "rloo"])
def test_their_reward_std_is_that_of_all_rewards(offline, ours, name):
    """Whatever the advantages are divided by; ours is the mean of the groups' own."""
    scores = ours(name)["rollout"]["scores"]
    theirs, mine = offline(name)["passes"][0]["metrics"]["reward_std"], ours(name)["metrics"]["reward_std"]
    assert theirs == pytest.approx(float(scores.std()), abs=TOLERANCE)
    assert mine == pytest.approx(float(scores.view(-1, SIZE).std(1).mean()), abs=TOLERANCE)
    assert abs(theirs - mine) > 0.01


def test_the_kl_of_their_rloo_is_k1_a_token(offline, ours):
    """One name for two things; ours of that name is k3, and ``objective/kl`` is k1 a response."""
    theirs, mine = offline("rloo")["passes"][0]["metrics"], ours("rloo")
    mask = mine["rollout"]["response_mask"]
    of_a_response = theirs["kl"] * float(mask.sum()) / len(mask)
    assert mine["metrics"]["objective/kl"] == pytest.approx(of_a_response, abs=TOLERANCE)
    assert mine["metrics"]["kl"] > 0 > theirs["kl"]


def test_their_kl_is_multiplied_by_the_ratio_unless_told_otherwise(offline, ours):
    """``use_bias_correction_kl``: at ratio 1 the loss is the same, and its gradient that of k2 instead of k3."""
    theirs, mine = offline("grpo-corrected-kl")["passes"][0], ours("grpo-corrected-kl")["passes"][0]
    assert mine["loss"] == pytest.approx(theirs["loss"], abs=TOLERANCE)
    assert mine["loss"] > 0.1
    assert distance(theirs["gradients"], mine["gradients"]) > 0.1


def test_their_log_probabilities_of_padded_prompts_are_wrong_where_positions_are_learnt(offline, ours):
    """They pad prompts on the left and give no positions: GPT-2 then reads the shorter prompt at others than it had."""
    theirs, mine = offline("grpo-gpt2")["rollout"], ours("grpo-gpt2")["rollout"]
    lengths = mine["attention_mask"].sum(1) - mine["response_mask"].sum(1)
    padded = lengths < lengths.max()
    assert padded.tolist() == [True] * SIZE + [False] * SIZE
    gaps = (torch.tensor(theirs["old_per_token_logps"]) - mine["logprobs"]).abs().amax(1)
    assert float(gaps[~padded].max()) < TOLERANCE
    assert float(gaps[padded].min()) > 0.01


@pytest.mark.parametrize("name", ["gspo", "rloo"])
def test_their_clip_shares_are_of_responses_where_a_response_has_one_ratio(offline, ours, name):
    """Ours are of tokens: each response counts as often as it has tokens."""
    theirs, mine = (side(name)["passes"][1] for side in (offline, ours))
    eighths = theirs["metrics"]["clip_ratio/region_mean"] * 8
    assert eighths == pytest.approx(round(eighths), abs=TOLERANCE)
    assert eighths >= 1
    tokens = float(ours(name)["rollout"]["response_mask"].sum())
    counted = mine["means"]["clip_ratio/region_mean"] * tokens
    assert counted == pytest.approx(round(counted), abs=1e-3)
    assert counted >= eighths


def test_their_cispo_counts_capped_tokens_of_good_responses_alone(offline, ours):
    """The cap holds, and changes the gradient, whatever the sign of the advantage; ours counts both."""
    theirs = offline("cispo")["passes"][1]["metrics"]["cispo_clip_ratio"]
    assert 0 < theirs < ours("cispo")["passes"][1]["means"]["clip_ratio/high_mean"]


def test_their_clip_shares_know_nothing_of_the_cap_on_bad_responses(offline, ours):
    """Two-sided clipping takes the gradient of a token whose ratio is over delta; we count it among the high ones."""
    theirs, mine = (side("two-sided")["passes"][1] for side in (offline, ours))
    assert mine["means"]["clip_ratio/low_mean"] == pytest.approx(
        theirs["metrics"]["clip_ratio/low_mean"], abs=TOLERANCE
    )
    assert mine["means"]["clip_ratio/high_mean"] > theirs["metrics"]["clip_ratio/high_mean"] + 0.01
    assert GROUPS["two-sided"].loss.ratio_cap == TWO_SIDED
