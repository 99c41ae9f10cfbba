"""Final answers: where they are found, and when two are the same."""

import json
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards import FinalAnswerReward, MathReward
from rlhf_lightning.rewards.answers import as_number, final_answer, same_answer
from rlhf_lightning.rewards.reward import Samples, applicable_scores, checked_scores

GSM8K = Path(__file__).parents[4] / "shared" / "data" / "gsm8k" / "test.jsonl"


def samples(completions, truths, name="answer"):
    n = len(completions)
    return Samples(["p"] * n, completions, [[1]] * n, [False] * n, {name: truths})


@pytest.mark.parametrize(
    ("text", "place", "answer"),
    [
        (r"so \boxed{\frac{1}{2}} and \boxed{ x^{2} }.", "any", "x^{2}"),
        (r"\boxed{1} and \boxed{2", "any", "2"),
        (r"\boxed{1} and \boxed{2", "boxed", None),
        ("3 apples\n#### 1,234 \nmore 5", "any", "1,234"),
        ("####", "hashes", None),
        ("it costs $1,234.50, or 7", "last_number", "7"),
        ("it costs $1,234.50.", "last_number", "$1,234.50"),
        ("from 10 to -3", "any", "-3"),
        ("it is 3/4 of it", "any", "3/4"),
        ("by 25%.", "any", "25%"),
        ("version v2", "any", None),
        ("nothing", "any", None),
        ("", "any", None),
    ],
)
def test_where_a_final_answer_stands(text, place, answer):
    assert final_answer(text, place) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [("1,000", 1000), ("-3.5", Fraction(-7, 2)), ("$12.00", 12), ("3/4", Fraction(3, 4)), ("50%", Fraction(1, 2)),
     (".5", Fraction(1, 2)), ("+7.", 7), ("1/0", None), ("x", None), ("1,00", None), ("", None), ("9" * 2000, None)],
)  # fmt: skip
def test_the_value_of_a_number(text, value):
    assert as_number(text) == value


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("1,000", "1000.0", True), ("0.5", "1/2", True), ("Yes.", " yes", True), ("New  York", "new york", True),
     ("1", "one", False), ("0.1", "1/10", True), ("0.33", "1/3", False), ("yes", "no", False)],
)  # fmt: skip
def test_when_two_answers_are_the_same(one, other, same):
    assert same_answer(one, other) is same_answer(other, one) is same


def test_one_for_the_right_final_answer():
    given = samples(["#### 72", "72 of 73", r"\boxed{72.0}", "so: 72.", "no"], ["a\n#### 72"] * 5)
    assert checked_scores(FinalAnswerReward(), given).tolist() == [1.0, 0.0, 1.0, 1.0, 0.0]
    assert checked_scores(FinalAnswerReward(place="boxed"), given).tolist() == [0.0, 0.0, 1.0, 0.0, 0.0]


def test_a_column_that_is_missing_or_empty():
    with pytest.raises(
        UserError, match="FinalAnswerReward needs the column 'solution', which the rows have not; they have answer"
    ):
        FinalAnswerReward("solution").score(samples(["a"], ["1"]))
    with pytest.raises(UserError, match="no answer in its column 'answer'"):
        FinalAnswerReward().score(samples(["a", "b"], ["1", " "]))


@pytest.mark.skipif(not GSM8K.is_file(), reason="no GSM8K beside the project")
def test_every_answer_of_gsm8k_is_found_and_is_itself():
    rows = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()]
    assert len(rows) > 1000
    assert sum(FinalAnswerReward().score(samples(rows, rows))) == len(rows)
    others = [*rows[1:], rows[0]]
    by_hand = [
        float(a.rsplit("#### ", 1)[1].replace(",", "")) == float(b.rsplit("#### ", 1)[1].replace(",", ""))
        for a, b in zip(rows, others, strict=True)
    ]
    assert FinalAnswerReward().score(samples(rows, others)) == by_hand


needs_math_verify = pytest.mark.skipif(find_spec("math_verify") is None, reason="needs the extra 'rules'")


@pytest.fixture(scope="module")
def maths():
    return MathReward(seconds=20.0)


@needs_math_verify
def test_the_same_mathematics(maths):
    rows = [
        (r"Thus $\boxed{\frac{1}{2}}$", "0.5", 1.0),
        (r"Thus $\boxed{\frac{1}{2}}$", r"\frac{2}{4}", 1.0),
        (r"The set is $\{2, 1\}$.", r"$\{1, 2\}$", 1.0),
        (r"$\boxed{(x+1)^2}$", "x^2+2x+1", 1.0),
        (r"$x = 3$", "3", 1.0),
        (r"$\boxed{\sqrt{8}}$", r"2\sqrt{2}", 1.0),
        (r"$\boxed{\sin(2x)}$", "sin(2x)", 1.0),
        ("It is 5.", "5 apples", 1.0),
        (r"$\boxed{3}$", "a\n#### 4", 0.0),
        ("I do not know", "4", 0.0),
        ("", "4", 0.0),
    ]
    texts, truths, expected = zip(*rows, strict=True)
    assert maths.score(samples(list(texts), list(truths))) == list(expected)


@needs_math_verify
def test_an_answer_that_is_no_mathematics_does_not_apply(maths):
    given = samples(["5", "5", "3"], ["5", "because he said so", "2*sqrt(3)"])
    scores, applies = applicable_scores(maths, given)
    assert (scores.tolist(), applies.tolist()) == ([1.0, 0.0, 0.0], [True, False, False])
    with pytest.raises(UserError, match="MathReward does not apply to 2 of 3"):
        checked_scores(maths, given)


@needs_math_verify
def test_an_expression_without_end_counts_as_wrong_and_the_next_is_judged():
    reward = MathReward(seconds=8.0, memory_mb=1024)
    endless = r"$\boxed{9^{9^{9^{9^{9}}}}+\sin(9^{9^{9^{9}}})!}$"
    assert reward.score(samples([endless, r"$\boxed{4}$", endless, r"$\boxed{5}$"], ["4", "4", "4", "5"])) == [
        0.0,
        1.0,
        0.0,
        1.0,
    ]
