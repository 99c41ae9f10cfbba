"""Rewards that are rules: values by hand."""

import json

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.rewards import soft_overlong_penalty
from rlhf_lightning.rewards import FormatReward, JSONSchemaReward, LengthReward, OverlongPenalty, RepetitionPenalty
from rlhf_lightning.rewards.reward import Samples, checked_scores


def score(reward, completions, lengths=None, **columns):
    n = len(completions)
    ids = [[1] * length for length in lengths or [3] * n]
    return checked_scores(reward, Samples(["p"] * n, completions, ids, [False] * n, columns)).tolist()


def test_the_soft_overlong_penalty_of_the_paper():
    lengths = [0, 16, 17, 18, 20, 21, 1000]
    expected = [0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -1.0]
    assert soft_overlong_penalty(torch.tensor(lengths), max_length=20, buffer=4).tolist() == expected
    assert score(OverlongPenalty(20, 4), ["a"] * 7, lengths) == expected

    def by_cases(n, most, buffer):  # as the paper writes it
        return 0.0 if n <= most - buffer else (most - buffer - n) / buffer if n <= most else -1.0

    lengths = list(range(60))
    found = soft_overlong_penalty(torch.tensor(lengths), max_length=50, buffer=7)
    torch.testing.assert_close(found, torch.tensor([by_cases(n, 50, 7) for n in lengths]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a\nb</think> 42", 1.0),
        ("  <think></think>\n", 1.0),
        ("<think>a 42", 0.0),
        ("so <think>a</think> 42", 0.0),
        ("<think>a<think>b</think></think>", 0.0),
        ("<think>a</think><think>b</think>", 0.0),
    ],
)
def test_thoughts_then_the_answer(text, expected):
    assert score(FormatReward(), [text]) == [expected]


def test_another_format():
    texts = ["abc 12", "12", "12 abc"]
    assert score(FormatReward(r"\d+"), texts) == [0.0, 1.0, 0.0]
    assert score(FormatReward(r"^\d+", whole=False), texts) == [0.0, 1.0, 1.0]
    with pytest.raises(UserError, match=r"'\(a' is no regular expression"):
        FormatReward("(a")
    with pytest.raises(UserError, match=r"more than 0\.05 s on the response 'aaa"):
        score(FormatReward(r"(a|a|aa)+b", seconds=0.05), ["a" * 200])


SCHEMA = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]}


def test_json_that_fits_a_schema():
    texts = [
        '{"age": 3}',
        'Here:\n```json\n{"age": 3}\n```',
        '{"age": -3}',
        "[1]",
        "{age: 3}",
        '{"age": NaN}',
        "[" * 100000,
        "",
    ]
    expected = [1.0, 1.0, 0.25, 0.25, 0.0, 0.0, 0.0, 0.0]
    assert score(JSONSchemaReward(SCHEMA, parsable=0.25), texts) == expected
    by_row = JSONSchemaReward(column="schema")
    assert score(by_row, texts[:2], schema=[json.dumps(SCHEMA), {"type": "array"}]) == [1.0, 0.0]


def test_schemas_that_are_none():
    with pytest.raises(UserError, match=r"no JSON schema.*'number of things'"):
        JSONSchemaReward({"type": "number of things"})
    with pytest.raises(UserError, match="no JSON schema"):
        score(JSONSchemaReward(column="schema"), ["1"], schema=["{"])
    with pytest.raises(UserError, match="needs the column 'schema'"):
        score(JSONSchemaReward(column="schema"), ["1"])
    for given in ({}, {"schema": SCHEMA, "column": "schema"}):
        with pytest.raises(UserError, match="either a schema or the column"):
            JSONSchemaReward(**given)


def test_a_length_between_two_bounds_costs_nothing():
    reward = LengthReward(least=3, most=5, cost=0.5)
    assert score(reward, ["a"] * 5, [1, 3, 4, 5, 8]) == [-1.0, 0.0, 0.0, 0.0, -1.5]
    assert score(LengthReward(most=2, cost=1.0, unit="words"), ["a b  c d", "a"]) == [-2.0, 0.0]
    assert score(LengthReward(least=2, cost=1.0, unit="characters"), ["", "äöü"]) == [-2.0, 0.0]
    for wrong in ({}, {"least": 5, "most": 3}, {"least": -1, "most": 3}):
        with pytest.raises(UserError, match="leave nothing to reward"):
            LengthReward(**wrong)


def test_repetition_is_the_share_of_ngrams_that_stood_there_before():
    # Of "a b a b a": ab ba ab ba, two of four again; as 3-grams aba bab aba, one of three.
    text = "a B A b a"
    assert score(RepetitionPenalty(n=2), [text, "a b c d", "a", ""]) == [-0.5, 0.0, 0.0, 0.0]
    assert score(RepetitionPenalty(n=3), [text]) == pytest.approx([-1 / 3])
    assert score(RepetitionPenalty(n=1, unit="tokens"), ["a"], [4]) == [-0.75]
    assert score(RepetitionPenalty(n=1, unit="characters"), ["aab"]) == pytest.approx([-1 / 3])
    with pytest.raises(UserError, match="at least 1"):
        RepetitionPenalty(n=0)


@pytest.mark.parametrize(("max_length", "buffer"), [(10, 0), (10, 11), (10, -1)])
def test_a_buffer_that_can_not_be_is_refused(max_length, buffer):
    with pytest.raises(UserError, match="from 1 to max_length"):
        OverlongPenalty(max_length, buffer)
