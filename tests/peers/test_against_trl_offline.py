"""SFT, reward model, DPO and IPO against TRL 1.16.0: equal, or apart by exactly what is named."""

import pytest
import torch

from rlhf_lightning.functional.preference import ipo_loss
from tests.peers.cases import BETA, OFFLINE
from tests.peers.measure import apart, distance
from tests.peers.problem import PAD

TOLERANCE = 1e-5
EQUAL = [
    "sft-llama", "sft-gpt2", "sft-accumulated", "reward-llama", "reward-gpt2", "dpo-llama", "dpo-gpt2",
    "dpo-at-its-reference", "aot-one-pair-at-a-time",
]  # fmt: skip
# Theirs is the learning rate of the trainer's schedule, and epoch is counted before rather than after the step.
NOT_COMPARED = {"learning_rate", "epoch"}
# Named below: means of micro-batch means; a tie that counts as wrong.
NAMED = {
    "sft-accumulated": {"entropy", "mean_token_accuracy"},
    "aot-one-pair-at-a-time": {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"},
    "dpo-at-its-reference": {"rewards/accuracies"},
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


@pytest.mark.parametrize("name", [name for name in OFFLINE if OFFLINE[name].micro_batches == OFFLINE[name].ours_in])
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
    assert {k: ours(name)["metrics"][k] for k in compared} == pytest.approx({k: theirs[k] for k in compared}, abs=1e-5)


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
