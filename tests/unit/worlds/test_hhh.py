"""The world's rows: shares, splits and labels against the specification's figures, and reproducible from the seed."""

import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.worlds import HHHWorld
from rlhf_lightning.worlds.grammar import OOD_PHRASING, parse_prompt, render_prompt
from tests.calls import function_calls

KINDS = ("demonstrations", "preferences", "prompts")
SHARES = {"fact": 0.27, "sum": 0.12, "unknown": 0.15, "harm": 0.14, "benign": 0.12, "sycophancy": 0.20}
GOOD = {"fact": 0.7, "sum": 0.7, "unknown": 0.4, "harm": 0.4, "benign": 0.7, "sycophancy": 0.4}


def text(messages):
    return messages[-1]["content"]


@pytest.fixture(scope="module")
def world():
    return HHHWorld(seed=0)


@pytest.fixture(scope="module")
def rows(world):
    return {kind: {split: part.to_list() for split, part in world.load(kind).items()} for kind in KINDS}


@pytest.fixture(scope="module")
def demonstration_scores(world, rows):
    return [world.gold(row["prompt"], text(row["completion"])) for row in rows["demonstrations"]["train"]]


def agreement(pairs):
    """How often the higher gold was chosen, ties counting one half."""
    gaps = [row["gold_chosen"] - row["gold_rejected"] for row in pairs]
    return sum(0.5 if abs(gap) < 1e-9 else float(gap > 0) for gap in gaps) / len(gaps)


def test_columns_and_counts(rows):
    pair = {"prompt", "chosen", "rejected", "annotator", "group", "kind", "gold_chosen", "gold_rejected"}
    columns = {"demonstrations": {"prompt", "completion"}, "preferences": pair, "prompts": {"prompt", "kind"}}
    counts = {"demonstrations": 8000, "preferences": 8000, "prompts": 4000}
    for kind in KINDS:
        assert {split: len(part) for split, part in rows[kind].items()} == {
            "train": counts[kind],
            "validation": 1000,
            "ood": 1000,
        }
        assert set(rows[kind]["train"][0]) == columns[kind]
    first = rows["demonstrations"]["train"][0]
    assert [message["role"] for message in first["prompt"] + first["completion"]] == ["user", "assistant"]


def test_kinds_have_their_shares(world, rows):
    for kind in KINDS:
        counts = Counter(world.kind(row["prompt"]) for row in rows[kind]["train"])
        for name, share in SHARES.items():
            assert counts[name] / len(rows[kind]["train"]) == pytest.approx(share, abs=0.02), (kind, name)


def test_a_quarter_of_the_claims_are_true(world, rows):
    claims = [row["prompt"] for row in rows["prompts"]["train"] if row["kind"] == "sycophancy"]
    true = sum(f" {parse_prompt(text(prompt)).claim} ." in world.best_response(prompt) for prompt in claims)
    assert true / len(claims) == pytest.approx(0.25, abs=0.05)


def test_demonstrations_are_good_as_often_as_their_kind_says(demonstration_scores):
    right = defaultdict(list)
    for score in demonstration_scores:
        right[score.kind].append(score.right)
    for kind, share in GOOD.items():
        assert sum(right[kind]) / len(right[kind]) == pytest.approx(share, abs=0.05), kind


def test_writers_are_wrong_in_the_typical_ways(demonstration_scores):
    def share(kind, flag):
        flags = [getattr(score, flag) for score in demonstration_scores if score.kind == kind]
        return sum(flags) / len(flags)

    assert share("harm", "complied_with_harm") == pytest.approx(0.6 * 0.85, abs=0.05)
    assert share("benign", "refused_benign") == pytest.approx(0.3 * 0.6, abs=0.05)
    assert share("sycophancy", "sycophantic") == pytest.approx(0.75 * 0.6 * 0.9, abs=0.05)


def test_gold_of_the_demonstrations(demonstration_scores):
    """What imitation can hope for: far below 1, and a few words below the length that is free."""
    count = len(demonstration_scores)
    assert sum(score.reward for score in demonstration_scores) / count == pytest.approx(0.12, abs=0.03)
    assert sum(score.words for score in demonstration_scores) / count == pytest.approx(11.8, abs=0.4)
    assert sum(score.polite for score in demonstration_scores) / count == pytest.approx(0.49, abs=0.03)
    assert not any(score.ungrammatical for score in demonstration_scores)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_splits_share_no_question_in_the_same_words(seed):
    parts = HHHWorld(seed).load("demonstrations")
    seen = {split: {text(p).removeprefix("hello . ") for p in part["prompt"]} for split, part in parts.items()}
    assert not seen["train"] & seen["validation"]
    assert not (seen["train"] | seen["validation"]) & seen["ood"]
    asked = {split: {parse_prompt(prompt) for prompt in prompts} for split, prompts in seen.items()}
    facts = {item for item in asked["validation"] if item.claim is None and item.topic not in ("sum", "request")}
    assert facts <= asked["train"]  # held out is the wording, not the fact
    assert all(prompt == render_prompt(parse_prompt(prompt), OOD_PHRASING) for prompt in seen["ood"])


def test_a_share_of_the_requests_is_asked_out_of_distribution_alone(rows):
    def requests(split):
        return {
            item for row in rows["preferences"][split] if (item := parse_prompt(text(row["prompt"]))).topic == "request"
        }

    only_ood = requests("ood") - requests("train") - requests("validation")
    assert 0.07 <= len(only_ood) / 120 <= 0.25
    assert not only_ood & requests("train")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_words_out_of_distribution_were_all_asked_in_training(seed):
    parts = HHHWorld(seed).load("demonstrations")
    words = {split: {word for p in part["prompt"] for word in text(p).split()} for split, part in parts.items()}
    assert words["ood"] <= words["train"]
    assert words["validation"] <= words["train"]


def test_labels_agree_with_gold_as_far_as_noise_allows(world, rows):
    pairs = rows["preferences"]["train"]
    assert agreement(pairs) == pytest.approx(0.847, abs=0.015)
    assert 0.83 <= world.bayes_accuracy(rows["preferences"]["validation"]) <= 0.87
    assert world.bayes_accuracy(pairs) == pytest.approx(0.85, abs=0.01)
    ties = sum(abs(row["gold_chosen"] - row["gold_rejected"]) < 1e-9 for row in pairs) / len(pairs)
    assert ties == pytest.approx(0.09, abs=0.015)
    assert all(row["chosen"] != row["rejected"] for row in pairs)


def test_gold_columns_are_the_worlds_own(world, rows):
    for row in rows["preferences"]["validation"][:100]:
        assert world.gold(row["prompt"], text(row["chosen"])).reward == row["gold_chosen"]
        assert world.gold(text(row["prompt"]), text(row["rejected"])).reward == row["gold_rejected"]


def test_groups_label_by_their_taste(rows):
    """Where gold ties, the polite group takes the response with more polite words more often than the direct group."""
    polite = {"thank", "nice", "happy", "please"}
    wins = defaultdict(list)
    for row in rows["preferences"]["train"]:
        chosen, rejected = (sum(w in polite for w in text(row[side]).split()) for side in ("chosen", "rejected"))
        if chosen != rejected and abs(row["gold_chosen"] - row["gold_rejected"]) < 0.11:
            wins[row["group"]].append(chosen > rejected)
    assert sum(wins["polite"]) / len(wins["polite"]) > sum(wins["direct"]) / len(wins["direct"]) + 0.05


def test_length_biased_annotators_prefer_the_longer():
    pairs = HHHWorld(seed=0, length_biased_annotators="all").load("preferences")["train"].to_list()
    lengths = [(len(text(row["chosen"]).split()), len(text(row["rejected"]).split())) for row in pairs]
    assert agreement(pairs) == pytest.approx(0.735, abs=0.03)
    assert sum(chosen > rejected for chosen, rejected in lengths) / len(pairs) == pytest.approx(0.637, abs=0.03)


def test_the_bias_changes_labels_and_nothing_else(rows):
    biased = HHHWorld(seed=0, length_biased_annotators="all").load("preferences")["validation"].to_list()
    for fair, other in zip(rows["preferences"]["validation"], biased, strict=True):
        assert fair["prompt"] == other["prompt"]
        assert {text(fair["chosen"]), text(fair["rejected"])} == {text(other["chosen"]), text(other["rejected"])}


DIGEST = """
import hashlib, json
from rlhf_lightning.worlds import HHHWorld
world = HHHWorld(seed=5, demonstrations=300, preferences=300, prompts=300, held_out=50)
rows = [part.to_list() for kind in ("demonstrations", "preferences", "prompts") for part in world.load(kind).values()]
digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
"""


def test_the_same_rows_in_a_fresh_process():
    here: dict = {}
    exec(DIGEST, here)
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", f"{DIGEST}\nprint(digest)"]
    run = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == here["digest"]


def test_another_seed_is_another_world(world):
    other = HHHWorld(seed=1)
    assert other.facts != world.facts
    assert other.load("prompts")["train"]["prompt"][:20] != world.load("prompts")["train"]["prompt"][:20]


def test_fewer_rows_are_the_first_of_more(rows):
    fewer = HHHWorld(seed=0, preferences=500)
    assert fewer.load("preferences")["train"].to_list() == rows["preferences"]["train"][:500]
    assert fewer.load("preferences")["validation"].to_list() == rows["preferences"]["validation"]


def test_a_row_takes_as_long_in_a_large_world_as_in_a_small_one():
    """300 calls for one of each kind; a search through the rows before it would grow with their number."""

    def calls(count):
        def load():
            world = HHHWorld(seed=9, **dict.fromkeys(KINDS, count))
            for kind in KINDS:
                world.load(kind)

        return function_calls(load)

    few, more, many = calls(300), calls(600), calls(1200)
    assert (more - few) / 300 < 600
    assert (many - more) / 600 < 1.3 * (more - few) / 300 + 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preferences": 0}, "preferences is 0"),
        ({"held_out": -1}, "held_out is -1"),
        ({"length_biased_annotators": "some"}, "'some'; choose"),
    ],
)
def test_impossible_worlds_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        HHHWorld(**arguments)


def test_unknown_rows_and_prompts_without_a_user_are_refused(world):
    with pytest.raises(UserError, match="has no 'rewards'"):
        world.load("rewards")
    with pytest.raises(UserError, match="no message of the user"):
        world.gold([{"role": "assistant", "content": "sure ."}], "it is red .")


def test_the_last_user_message_counts(world):
    turns = [
        {"role": "user", "content": "what is one plus one ?"},
        {"role": "assistant", "content": "it is two ."},
        {"role": "user", "content": "what is two plus two ?"},
    ]
    assert world.gold(turns, "it is four .").right
    assert not world.gold(turns, "it is two .").right
