"""SFT, reward model and the pair losses against TRL 1.16.0: equal, or apart by exactly what is named."""

import pytest
import torch

from rlhf_lightning.functional.preference import ipo_loss
from tests.peers.cases import BETA, OFFLINE, PAIR_LOSSES
from tests.peers.measure import apart, distance
from tests.peers.problem import PAD

TOLERANCE = 1e-5
EQUAL = [
    "sft-llama", "sft-gpt2", "sft-accumulated", "reward-llama", "reward-gpt2", "dpo-llama", "dpo-gpt2",
    "dpo-at-its-reference", "aot-one-pair-at-a-time", *PAIR_LOSSES,
]  # fmt: skip
WITHOUT_REFERENCE = ["cpo", "simpo", "orpo"]  # other trainers, which log raw logits and no sums of log-probabilities
# Theirs is the learning rate of the trainer's schedule, and epoch is counted before rather than after the step.
NOT_COMPARED = {"learning_rate", "epoch"}
# Named below: means of micro-batch means; a tie that counts as wrong.
NAMED = {
    "sft-accumulated": {"entropy", "mean_token_accuracy"},
    "aot-one-pair-at-a-time": {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"},
    "dpo-at-its-reference": {"rewards/accuracies"},
    "ld": {"logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins"},
    "cpo": {"logits/chosen", "logits/rejected", "nll_loss"},
    "simpo": {"logits/chosen", "logits/rejected", "logps/chosen", "logps/rejected", "nll_loss"},
}


@pytest.mark.parametrize("name", [name for name in OFFLINE if name != "reward-padded-with-eos"])
def test_both_read_the_same_tokens(offline, ours, name):
    rows = [
        sorted(tuple(row) for batch in side["input_ids"] for row in stripped(batch))
        for side in (offline(name), ours(name))
    ]
    assert rows[0] == rows[1]


def stripped(batch):
    return [[token for token in row if token != PAD] for row in batch]


@pytest.mark.parametrize("name", EQUAL)
def test_the_loss_is_theirs(offline, ours, name):
    assert ours(name)["loss"] == pytest.approx(offline(name)["loss"], abs=TOLERANCE)


@pytest.mark.parametrize(
    "name",
    [name for name, case in OFFLINE.items() if case.micro_batches == case.ours_in and name not in WITHOUT_REFERENCE],
)
def test_log_probabilities_and_scores_are_theirs(offline, ours, name):
    assert apart(offline(name)["outputs"], ours(name)["outputs"]) < TOLERANCE


@pytest.mark.parametrize("name", EQUAL)
def test_the_gradients_of_the_first_step_are_theirs(offline, ours, name):
    assert distance(offline(name)["gradients"], ours(name)["gradients"]) < TOLERANCE


@pytest.mark.parametrize("name", EQUAL)
def test_what_is_logged_is_theirs(offline, ours, name):
    theirs = offline(name)["metrics"]
    compared = theirs.keys() - NOT_COMPARED - NAMED.get(name, set())
    assert len(compared) >= 3
    # CPUs add float32 in different orders: a norm of 90 differs by 6e-5 between two of them. Ratios of probabilities have the
    # absolute error of a sum of log-probabilities, 30 nats times 2**-24 or more, as their relative error.
    expected = pytest.approx({k: theirs[k] for k in compared}, abs=1e-5, rel=1e-5)
    assert {k: ours(name)["metrics"][k] for k in compared} == expected


def test_their_metrics_are_means_of_micro_batch_means(offline, ours):
    """Ours are over the tokens of the whole step, as the loss of both is."""
    batches = [torch.tensor(batch) for batch in ours("sft-accumulated")["entropies"]]
    assert [len(batch) for batch in batches] == [7, 9]
    theirs, mine = offline("sft-accumulated")["metrics"]["entropy"], ours("sft-accumulated")["metrics"]["entropy"]
    assert theirs == pytest.approx(float(torch.stack([batch.mean() for batch in batches]).mean()), abs=TOLERANCE)
    assert mine == pytest.approx(float(torch.cat(batches).mean()), abs=TOLERANCE)
    assert theirs - mine > 1e-3


def test_a_tie_is_wrong_to_them_and_half_right_to_us(offline, ours):
    """At the reference every implicit reward is zero."""
    assert offline("dpo-at-its-reference")["metrics"]["rewards/accuracies"] == 0
    assert ours("dpo-at-its-reference")["metrics"]["rewards/accuracies"] == 0.5


def test_their_sigmoid_loss_ignores_label_smoothing(offline, ours):
    """-(1-e) ls(x) - e ls(-x) = -ls(x) + e x, so that it lacks e times the mean margin; their AOT loss has it."""
    smoothed, plain = offline("dpo-smoothed"), offline("dpo-llama")
    assert smoothed["loss"] == plain["loss"]
    assert smoothed["gradients"] == plain["gradients"]
    missing = 0.1 * plain["metrics"]["rewards/margins"]
    assert missing > 0.02
    assert ours("dpo-smoothed")["loss"] - smoothed["loss"] == pytest.approx(missing, abs=TOLERANCE)
    assert ours("dpo-smoothed")["loss"] == pytest.approx(offline("aot-one-pair-at-a-time")["loss"], abs=TOLERANCE)


def test_on_responses_of_one_length_ipo_is_theirs_up_to_units(offline, ours):
    """Averaged over n tokens, h/n - 1/(2b) = (h - n/(2b)) / n: our loss at tau = b/n is n^2 times theirs."""
    length, theirs, mine = 4, offline("ipo-even"), ours("ipo-even")
    assert {tokens for _, tokens in mine["log_ratios"]} == {length}
    assert OFFLINE["ipo-even"].loss["tau"] == BETA / length
    assert mine["loss"] / length**2 == pytest.approx(theirs["loss"], abs=TOLERANCE)
    scaled = {name: [x / length**2 for x in numbers] for name, numbers in mine["gradients"].items()}
    assert distance(theirs["gradients"], scaled) < TOLERANCE


def test_their_ipo_averages_log_ratios_over_tokens(offline, ours):
    mine = ours("ipo-uneven")
    means = torch.tensor([ratio / tokens for ratio, tokens in mine["log_ratios"]])
    averaged = ipo_loss(*means.chunk(2), tau=BETA).mean()
    assert float(averaged) == pytest.approx(offline("ipo-uneven")["loss"], abs=TOLERANCE)
    sums = torch.tensor([ratio for ratio, _ in mine["log_ratios"]])
    assert mine["loss"] == pytest.approx(float(ipo_loss(*sums.chunk(2), tau=BETA).mean()), abs=TOLERANCE)
    assert mine["loss"] / offline("ipo-uneven")["loss"] > 2


def test_padded_with_eos_their_reward_model_reads_the_token_before_eos(offline, ours):
    """Transformers' classifiers look for the last token that is not the pad id. Ours is given rows without EOS here."""
    name = "reward-padded-with-eos"
    assert all(2 in row for batch in offline(name)["input_ids"] for row in batch)
    assert not any(2 in row for batch in ours(name)["input_ids"] for row in batch)
    assert ours(name)["loss"] == pytest.approx(offline(name)["loss"], abs=TOLERANCE)
    assert apart(offline(name)["outputs"], offline("reward-llama")["outputs"]) > 0.1


def test_their_logps_of_ld_dpo_lack_the_share_of_the_longer_ones_tail(offline, ours):
    """So do their rewards; ours are of whole responses in every loss."""
    rest, tokens = ours("ld")["outputs"], []
    for _, length in ours("ld")["log_ratios"]:
        tokens.append(rest[:length])
        rest = rest[length:]
    common = [min(map(len, pair)) for pair in zip(*(tokens[:4], tokens[4:]), strict=True)] * 2
    alpha = OFFLINE["ld"].loss["alpha"]
    sums = [sum(row[:n]) + alpha * sum(row[n:]) for row, n in zip(tokens, common, strict=True)]
    theirs, mine = offline("ld")["metrics"], ours("ld")["metrics"]
    assert theirs["logps/chosen"] == pytest.approx(sum(sums[:4]) / 4, abs=TOLERANCE)
    assert theirs["logps/rejected"] == pytest.approx(sum(sums[4:]) / 4, abs=TOLERANCE)
    assert mine["logps/chosen"] == pytest.approx(sum(map(sum, tokens[:4])) / 4, abs=TOLERANCE)


def test_their_logps_of_simpo_and_orpo_are_means(offline, ours):
    """One name for two things; ours are sums in every loss, and the rewards are of the means."""
    for name, beta in (("simpo", 2.0), ("orpo", BETA)):
        theirs, mine = offline(name)["metrics"], ours(name)["metrics"]
        for side in ("chosen", "rejected"):
            assert theirs[f"logps/{side}"] == pytest.approx(mine[f"rewards/{side}"] / beta, abs=TOLERANCE)
            assert mine[f"logps/{side}"] < 2 * theirs[f"logps/{side}"]


def test_their_nll_of_orpo_is_of_prompts_too(offline, ours):
    """The paper's is of the response, as ours: the mean over tokens in each. The odds-ratio term is the same."""
    theirs, mine = offline("orpo")["metrics"], ours("orpo")["metrics"]
    for name in ("log_odds_ratio", "log_odds_chosen", "rewards/margins", "rewards/accuracies"):
        assert mine[name] == pytest.approx(theirs[name], abs=TOLERANCE)
    term = -BETA * theirs["log_odds_ratio"]
    assert offline("orpo")["loss"] == pytest.approx(theirs["nll_loss"] + term, abs=TOLERANCE)
    chosen = torch.tensor(ours("orpo")["means"])[: len(OFFLINE["orpo"].pairs)]
    assert ours("orpo")["loss"] == pytest.approx(float(-chosen.mean()) + term, abs=TOLERANCE)
    assert abs(theirs["nll_loss"] + float(chosen.mean())) > 0.01
