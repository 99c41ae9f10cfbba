"""Rankings: formats, what is wrong with rows, tokens and batches by hand, and what annotators say of pairs."""

import json
import math
import re

import pytest
import torch
from datasets import Dataset

from rlhf_lightning.data.format_table import detect_format
from rlhf_lightning.data.formats import Converter, to_canonical
from rlhf_lightning.data.message_trees import MessageTreeSource
from rlhf_lightning.data.rankings import RankingCollator, RankingDataModule, rankings
from rlhf_lightning.data.tokenization import tokenize_preferences
from rlhf_lightning.errors import UserError
from rlhf_lightning.worlds import HHHWorld

Q = [{"role": "user", "content": "q"}]
THREE = {"prompt": "q", "completions": ["a", "b", "c"]}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


def bot(text):
    return [{"role": "assistant", "content": text}]


def canonical(*rows, kind="rankings"):
    return to_canonical(Dataset.from_list(list(rows)), kind, origin="f.jsonl").to_list()


# ---------------------------------------------------------------- formats


def test_rankings_by_hand():
    expected = {**THREE, "ranks": [2.0, 0.0, 1.0]}
    assert canonical({**THREE, "ranks": [2, 0, 1]}) == [expected]
    assert canonical({**THREE, "ranking": [1, 2, 0]}) == [expected]
    tied = canonical({**THREE, "ranks": [0.5, 0.5, 3.0], "weight": 2, "source": "web"})
    assert tied == [{**THREE, "ranks": [0.5, 0.5, 3.0], "weight": 2.0, "source": "web"}]


def test_nemos_rankings_by_hand():
    completions = [{"rank": r, "completion": bot(t)} for r, t in ((1, "b"), (0, "a"), (2, "c"))]
    assert canonical({"context": Q, "completions": completions}) == [
        {"prompt": Q, "completions": [bot("b"), bot("a"), bot("c")], "ranks": [1.0, 0.0, 2.0]}
    ]


def test_a_pair_is_a_ranking_of_two_and_a_ranking_all_of_its_pairs():
    assert canonical(PAIR) == [{"prompt": "q", "completions": ["a", "b"], "ranks": [0.0, 1.0]}]
    found = canonical({**THREE, "ranks": [1, 0, 1]}, kind="preferences")
    assert found == [{"prompt": "q", "chosen": "b", "rejected": other} for other in ("a", "c")]
    assert canonical({**THREE, "ranks": [1, 0, 1]}, kind="demonstrations") == [{"prompt": "q", "completion": "b"}]


def test_rankings_without_an_order_are_left_out_and_counted(caplog):
    good = {**THREE, "ranks": [0, 1, 2]}
    twice = {"prompt": "q", "completions": ["a", "b", "a"], "ranks": [0, 1, 2]}
    assert len(canonical(good, {**THREE, "ranks": [1, 1, 1]}, twice)) == 1
    assert "1 with no two completions told apart, 1 with the same completion twice" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**THREE, "ranks": [0, 1]}, "2 ranks for 3 completions"),
        ({**THREE, "ranks": [0, 1, None]}, "a rank is None"),
        ({**THREE, "ranks": [0, 1, math.nan]}, "a rank is nan"),
        ({**THREE, "ranking": [0, 1, 3]}, "names completion 3; there are 3"),
        ({**THREE, "ranking": [0, -1, 1]}, "names completion -1"),
        ({**THREE, "ranking": [0, 1, 1]}, "names completion 1 more than once"),
        ({**THREE, "ranking": [0, 2]}, "leaves out completion 1"),
        ({**THREE, "ranking": None}, "column 'ranking' is None"),
        ({"prompt": "q", "completions": [], "ranks": []}, "a list of answers, not empty"),
        ({"prompt": "q", "completions": ["a", None], "ranks": [0, 1]}, "column 'completions' is missing or null"),
        ({**THREE, "ranks": [0, 1, 2], "weight": -1}, "column 'weight' is -1"),
        (
            {"context": Q, "completions": [{"rank": 0, "completion": "a"}, {"rank": "x", "completion": "b"}]},
            "rank is 'x'",
        ),
    ],
)
def test_what_is_wrong_is_named_with_file_and_row(row, message):
    converter = Converter(detect_format(list(row), row), "rankings", "f.jsonl")
    with pytest.raises(UserError, match=rf"f\.jsonl, row 2 .*{re.escape(message)}"):
        converter.try_row(row, "f.jsonl, row 2")


# ---------------------------------------------------------------- what annotators say of pairs


def test_ties_soft_labels_and_weights_of_pairs(word):
    said = [
        {"chosen_probability": 0.7, "tie": None, "weight": None},
        {"chosen_probability": None, "tie": True, "weight": 0.25},
        {"chosen_probability": None, "tie": False, "weight": 3},
    ]
    rows = canonical(*({**PAIR, **row} for row in said), kind="preferences")
    assert [(row["chosen_probability"], row["weight"]) for row in rows] == [(0.7, 1.0), (0.5, 0.25), (1.0, 3.0)]
    assert all("tie" not in row for row in rows)
    tokens = tokenize_preferences(Dataset.from_list(rows), word)
    assert tokens["weight"][:] == [1.0, 0.25, 3.0]
    assert tokens["chosen_probability"][:] == pytest.approx([0.7, 0.5, 1.0])


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"weight": -0.5}, "column 'weight' is -0.5"),
        ({"weight": 0}, "column 'weight' is 0"),
        ({"chosen_probability": 1.01}, "column 'chosen_probability' is 1.01; it must be in [0, 1]"),
        ({"chosen_probability": -0.1}, "column 'chosen_probability' is -0.1"),
        ({"chosen_probability": math.nan}, "column 'chosen_probability' is nan"),
        ({"chosen_probability": "much"}, "column 'chosen_probability' is 'much'"),
        ({"tie": "yes"}, "column 'tie' is 'yes'"),
        ({"tie": True, "chosen_probability": 0.9}, "column 'chosen_probability' is 0.9 where 'tie' is true"),
    ],
)
def test_what_annotators_can_not_say_is_named_with_file_and_row(said, message):
    with pytest.raises(UserError, match=rf"f\.jsonl, row 1 .*{re.escape(message)}"):
        canonical({**PAIR, **said}, kind="preferences")


# ---------------------------------------------------------------- tokens and batches


def tokenized(word, *rows, max_length=64):
    return rankings(word, max_length).tokenize(Dataset.from_list(list(rows)))


def test_tokens_by_hand(word):
    (row,) = tokenized(word, {"prompt": "a", "completions": ["b", "c d", "e"], "ranks": [1.0, 0.0, 1.0]})
    assert (row["prompt_ids"], row["completion_ids"]) == ([1, 6], [7, 2, 8, 9, 2, 10, 2])
    assert (row["completion_lengths"], row["ranks"]) == ([2, 3, 2], [1.0, 0.0, 1.0])
    assert (row["weight"], row["length"], row["overlong"], row["places"]) == (1.0, 5, 0, 2)


def test_long_completions_leave_their_ranking_and_rankings_without_an_order_go(word, caplog):
    rows = [
        {"prompt": "a", "completions": ["b", "c d e", "e"], "ranks": [1.0, 0.0, 2.0]},
        {"prompt": "a", "completions": ["b", "c d e", "e"], "ranks": [1.0, 0.0, 1.0]},
    ]
    (row,) = tokenized(word, *rows, max_length=4)
    assert (row["completion_ids"], row["ranks"], row["overlong"]) == ([7, 2, 10, 2], [1.0, 2.0], 1)
    assert "left out 1 of 2 rows: rankings without an order among completions up to 4 tokens" in caplog.text
    assert "cut 1 of 1 rankings: they lose completions longer than 4 tokens" in caplog.text


def test_a_batch_by_hand():
    columns = {
        "prompt_ids": [[1], [3, 4]],
        "completion_ids": [[5, 2, 6, 7, 2], [8, 2, 2, 9, 2]],
        "completion_lengths": [[2, 3], [2, 1, 2]],
        "ranks": [[1.0, 0.0], [0.0, 2.0, 2.0]],
        "weight": [1.0, 0.5],
    }
    batch = RankingCollator(0)((columns, 1.5))
    assert batch.input_ids.tolist() == [[1, 5, 2, 0], [1, 6, 7, 2], [3, 4, 8, 2], [3, 4, 2, 0], [3, 4, 9, 2]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 0], [1] * 4, [1] * 4, [1, 1, 1, 0], [1] * 4]
    assert batch.response_mask.int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert batch.ranks.tolist() == [1.0, 0.0, 0.0, 2.0, 2.0]
    assert batch.prompt.tolist() == [0, 0, 1, 1, 1]
    assert (batch.weight.tolist(), batch.normalizer.item()) == ([1.0, 0.5], 1.5)


def test_the_worlds_rankings_follow_the_gold_reward_with_noise():
    rows = HHHWorld(rankings=400, held_out=1).load("rankings")["train"]
    better = worse = 0
    for row in rows:
        assert sorted(row["ranks"]) == [0, 1, 2, 3]
        assert len({json.dumps(text) for text in row["completions"]}) == 4
        for high, gold in zip(row["ranks"], row["gold"], strict=True):
            for low, other in zip(row["ranks"], row["gold"], strict=True):
                better += high < low and gold > other
                worse += high < low and gold < other
    assert 0.8 < better / (better + worse) < 0.97  # annotators are right in about nine of ten that differ


def test_the_data_module_gives_batches_of_whole_rankings():
    data = RankingDataModule(HHHWorld(rankings=12, held_out=4), batch_size=4, max_length=64)
    data.prepare_data()
    batches = list(data.train_dataloader())
    assert [len(batch.weight) for batch in batches] == [4, 4, 4]
    assert all(torch.equal(batch.prompt.bincount(), torch.full((4,), 4)) for batch in batches)


# ---------------------------------------------------------------- message trees


def message(role, text, replies=(), rank=None):
    return {"role": role, "text": text, "replies": list(replies), "rank": rank}


def test_a_tree_gives_a_ranking_for_every_message_with_ranked_replies(tmp_path):
    below = message("prompter", "and now?", [message("assistant", t, rank=r) for t, r in (("x", 1), ("y", 0))])
    answers = [message("assistant", "a", [below], rank=0), message("assistant", "b", rank=1), message("assistant", "c")]
    file = tmp_path / "trees.jsonl"
    file.write_text(json.dumps({"message_tree_id": "1", "prompt": message("prompter", "q", answers)}) + "\n")
    rows = to_canonical(MessageTreeSource(str(file)).load("rankings")["train"], "rankings").to_list()
    longer = [*Q, *bot("a"), {"role": "user", "content": "and now?"}]
    assert rows == [
        {"prompt": Q, "completions": [bot("a"), bot("b")], "ranks": [0.0, 1.0]},
        {"prompt": longer, "completions": [bot("x"), bot("y")], "ranks": [1.0, 0.0]},
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2 is no message tree: JSONDecodeError"),
        (json.dumps({"text": "q"}), "line 2 is no message tree: KeyError 'prompt'"),
        (json.dumps({"prompt": message("prompter", 3)}), "line 2 is no message tree: TypeError a message has no text"),
        (json.dumps({"prompt": message("cook", "q")}), "a message has the role 'cook'"),
    ],
)
def test_what_is_no_tree_is_named_with_file_and_line(tmp_path, line, reason):
    file = tmp_path / "trees.jsonl"
    file.write_text(json.dumps({"prompt": message("prompter", "q")}) + "\n" + line + "\n")
    with pytest.raises(UserError, match=re.escape(reason)):
        MessageTreeSource(str(file)).load("rankings")


def test_trees_without_ranked_replies_are_refused(tmp_path):
    file = tmp_path / "trees.jsonl"
    file.write_text(json.dumps({"prompt": message("prompter", "q", [message("assistant", "a", rank=0)])}) + "\n")
    with pytest.raises(UserError, match="no message has two ranked replies"):
        MessageTreeSource(str(file)).load("rankings")
