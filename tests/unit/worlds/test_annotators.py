"""The annotators' choices against the formula worked by hand, and against their own frequencies."""

import random

import pytest

from rlhf_lightning.worlds import Annotator, annotators, bayes_accuracy, gold_score
from rlhf_lightning.worlds.grammar import ATTRIBUTES, OBJECTS

FACTS = dict.fromkeys(((attribute, thing) for attribute in ATTRIBUTES for thing in OBJECTS), "red")
QUESTION = "what colour is the hat ?"
CURT, POLITE, WRONG = "it is red .", "it is red . have a nice day .", "it is blue ."
LONG = "good question . it is red . i hope that this helps . sure ."  # 15 words: gold .75


def score(text):
    return gold_score(QUESTION, text, FACTS)


def test_choice_by_hand():
    # utilities 1.05 and .8: sigmoid(.25 / .2) = .7772998612; .02 + .96 * .7772998612
    assert Annotator("a", "polite", 0.04).prefers_first(score(POLITE), score(CURT)) == pytest.approx(
        0.7662078667, abs=1e-9
    )
    # utilities .95 and .8: sigmoid(.75) = .6791786992; .02 + .96 * .6791786992
    assert Annotator("a", "direct", 0.04).prefers_first(score(POLITE), score(CURT)) == pytest.approx(
        0.6720115512, abs=1e-9
    )


def test_length_biased_utility_by_hand():
    assert Annotator("a", "direct", 0.0).utility(score(LONG)) == pytest.approx(0.75)
    assert Annotator("a", "direct", 0.0, length_biased=True).utility(score(LONG)) == pytest.approx(0.8 + 0.06 * 15)


def test_taste_counts_two_polite_words_at_most():
    text = "thank you for asking . it is red . have a nice day . i am happy to help ."  # three polite words, 20 words
    assert Annotator("a", "polite", 0.0).utility(score(text)) == pytest.approx(1.0 - 0.3 + 0.1)


def test_the_two_orders_are_complementary():
    for annotator in annotators("half"):
        there, back = (
            annotator.prefers_first(*pair) for pair in ((score(LONG), score(WRONG)), (score(WRONG), score(LONG)))
        )
        assert there + back == pytest.approx(1.0)


def test_lapses_bound_what_the_surest_annotator_says():
    for annotator in annotators():
        assert annotator.prefers_first(score(POLITE), score(WRONG)) == pytest.approx(1 - annotator.lapse / 2, abs=2e-3)


def test_six_in_two_groups_with_three_lapses_each():
    six = annotators()
    assert len({a.name for a in six}) == 6
    assert all(sorted(a.lapse for a in six if a.group == g) == [0.02, 0.04, 0.06] for g in ("polite", "direct"))
    assert [sum(a.length_biased for a in annotators(bias)) for bias in ("none", "half", "all")] == [0, 3, 6]


def test_bayes_accuracy_is_what_the_likelier_label_achieves():
    pairs, judges = (
        [(score(CURT), score(POLITE)), (score(LONG), score(CURT)), (score(WRONG), score(CURT))],
        annotators(),
    )
    rng, draws, agreed = random.Random(0), 20_000, 0
    for first, second in pairs:
        votes = [rng.random() < rng.choice(judges).prefers_first(first, second) for _ in range(draws)]
        agreed += max(sum(votes), draws - sum(votes))
    assert bayes_accuracy(pairs, judges) == pytest.approx(agreed / draws / len(pairs), abs=0.01)


def test_bayes_accuracy_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no pairs"):
        bayes_accuracy([], annotators())
