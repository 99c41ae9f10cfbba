"""Liked and disliked completions: what becomes of each format, of pairs, and of what teaches nothing."""

import json
import logging

import pytest
import torch
from datasets import Dataset, DatasetDict

from rlhf_lightning.data import chunks
from rlhf_lightning.data.collate import UnpairedCollator
from rlhf_lightning.data.formats import to_canonical
from rlhf_lightning.data.sources import Source
from rlhf_lightning.data.splits import Split
from rlhf_lightning.data.streams import StreamSource
from rlhf_lightning.data.unpaired import UnpairedDataModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.worlds import HHHWorld, world_tokenizer
from tests.invariance.subjects import tokenizer

Q, A, B = ([{"role": role, "content": text}] for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
HH = "\n\nHuman: q\n\nAssistant: {}"
LIKED, DISLIKED = ({"prompt": "q", "completion": text, "label": label} for text, label in (("a", True), ("b", False)))
IN_TURNS = [{"prompt": Q, "completion": A, "label": True}, {"prompt": Q, "completion": B, "label": False}]
EOS = 2


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "completion": "b", "label": False}, [DISLIKED]),
        ({"prompt": "q", "completion": "a", "label": 1}, [LIKED]),
        ({"messages": Q + A, "label": True}, IN_TURNS[:1]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "b"}], "kto_tag": False}, IN_TURNS[1:]),
        ({"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}, [LIKED | {"completion": "a\nb", "label": False}]),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, [LIKED, DISLIKED]),
        ({"chosen": HH.format("a"), "rejected": HH.format("b")}, IN_TURNS),
        ({"messages": Q + A, "rejected_response": "b"}, IN_TURNS),
    ],
    ids=["unpaired", "a number", "messages", "sharegpt", "steps", "a pair", "hh", "swift"],
)  # fmt: skip
def test_each_format_by_hand(row, expected):
    found = to_canonical(Dataset.from_list([row]), "unpaired").to_list()
    assert [{name: found_row[name] for name in expected[0]} for found_row in found] == expected


def test_pairs_are_taken_apart_aloud_and_their_other_columns_go_with_both(caplog):
    caplog.set_level(logging.INFO)
    pairs = [{"prompt": "q", "chosen": f"a{i}", "rejected": f"b{i}", "id": i} for i in range(3)]
    pairs.insert(1, {"prompt": "q", "chosen": "same", "rejected": "same", "id": 9})
    found = to_canonical(Dataset.from_list(pairs), "unpaired")
    assert found["completion"] == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert found["label"] == [True, False] * 3
    assert found["id"] == [0, 0, 1, 1, 2, 2]
    assert "each pair as a liked and a disliked answer" in caplog.text
    assert "1 with the same text as chosen and rejected" in caplog.text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([LIKED | {"label": 1.0}, LIKED | {"label": 0.5}], "row 2.*column 'label' is 0.5; it must be true or false"),
        ([LIKED | {"label": None}], "row 1.*column 'label' is None"),
        ([{"prompt": "q", "completion": "a"}], "row 1.*nobody liked or disliked anything: add a column 'label'"),
        ([{"messages": Q + A}], "row 1.*nobody liked or disliked anything"),
        ([{"prompt": "q"}], "row 1.*nobody liked or disliked anything"),
    ],
)
def test_what_is_no_judgement_is_named(rows, message):
    with pytest.raises(UserError, match=message):
        to_canonical(Dataset.from_list(rows), "unpaired")


class Rows(Source):
    """Rows of a list."""

    def __init__(self, *rows):
        self.rows = rows

    def __str__(self):
        return "these rows"

    def load(self, kind):
        return DatasetDict(train=Dataset.from_list(list(self.rows)))

    def tokenizer(self):
        return tokenizer()


def prepared(source, **settings):
    data = UnpairedDataModule(source, **{"split": Split(validation=0), "batch_size": 4, **settings})
    data.prepare_data()
    data.setup("fit")
    return data


def test_completions_end_with_eos_unless_they_were_cut_off():
    rows = [
        {"prompt": "a b", "completion": "c", "label": True, "completion_truncated": True},
        {"prompt": "a b", "completion": "c d", "label": False, "completion_truncated": False},
    ]
    data = prepared(Rows(*rows))
    assert [ids[-1] == EOS for ids in data.rows["train"]["completion_ids"]] == [False, True]
    assert data.rows["train"]["label"] == [True, False]
    assert data.label_counts() == (1, 1)

    pair = {"prompt": "a b", "chosen": "c", "rejected": "d", "chosen_truncated": False, "rejected_truncated": True}
    assert [ids[-1] == EOS for ids in prepared(Rows(pair)).rows["train"]["completion_ids"]] == [True, False]


def test_what_was_cut_off_has_no_eos_though_a_template_writes_one():
    asked = [{"role": "user", "content": "a b"}]

    def said(text):
        return [{"role": "assistant", "content": text}]

    rows = [
        {"prompt": asked, "completion": said("c"), "label": True, "completion_truncated": True},
        {"prompt": asked, "completion": said("d"), "label": False, "completion_truncated": False},
    ]
    cut, whole = prepared(Rows(*rows)).rows["train"]["completion_ids"]
    assert whole[-1] == EOS
    assert EOS not in cut
    assert len(cut) == len(whole) - 1


def test_long_rows_are_left_out_and_counted(caplog):
    rows = [{"prompt": "a", "completion": "b " * n, "label": n % 2 == 0} for n in (1, 2, 3, 30)]
    data = prepared(Rows(*rows), max_length=12)
    assert len(data.rows["train"]) == 3
    assert "left out 1 of 4 rows: labelled completions longer than 12 tokens (max_length)" in caplog.text


@pytest.mark.parametrize(("label", "word"), [(True, "liked"), (False, "disliked")])
def test_rows_of_one_kind_only_are_refused(label, word):
    rows = [{"prompt": "a", "completion": text, "label": label} for text in "bcd"]
    with pytest.raises(UserError, match=f"these rows: all 3 training rows are {word}; nothing tells good from bad"):
        prepared(Rows(*rows))


def test_the_collator_puts_each_answer_behind_the_next_prompt():
    columns = {
        "prompt_ids": [[4], [5, 6], [7, 8, 9]],
        "completion_ids": [[10, 2], [11, 11, 2], [2]],
        "label": [True, False, True],
    }
    batch = UnpairedCollator(0, 8)((columns, 1.5))
    rows = [ids[real].tolist() for ids, real in zip(batch.input_ids, batch.attention_mask, strict=True)]
    assert rows == [[4, 10, 2], [5, 6, 11, 11, 2], [7, 8, 9, 2], [4, 2], [5, 6, 10, 2], [7, 8, 9, 11, 11, 2]]
    answers = [ids[mask].tolist() for ids, mask in zip(batch.input_ids, batch.response_mask, strict=True)]
    assert answers == [[10, 2], [11, 11, 2], [2], [2], [10, 2], [11, 11, 2]]
    assert batch.label.tolist() == [True, False, True]
    assert batch.label.dtype == torch.bool
    assert batch.normalizer.item() == 1.5

    short = UnpairedCollator(0, 5)((columns, 1.5))  # no longer than the longest that was measured
    assert short.input_ids[5].tolist() == [7, 8, 9, 11, 11]


def test_another_prompts_answer_makes_no_row_longer_than_the_longest_that_networks_were_checked_for():
    rows = [
        {"prompt": "a " * 9, "completion": "b", "label": True},
        {"prompt": "c", "completion": "d " * 9, "label": False},
    ]
    data = prepared(Rows(*rows), batch_size=2)
    longest = max(data.rows["train"]["length"])
    (batch,) = data.train_dataloader()
    assert batch.attention_mask.sum(1).max().item() == longest < 20


def test_a_stream_of_pairs_begins_again_at_any_batch(tmp_path, monkeypatch):
    """Some pairs lose a half, which is too long, so that windows begin amid a pair."""
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 5)
    pairs = [
        {"prompt": "a", "chosen": "b " * (1 + n % 7), "rejected": "c " * (40 if n % 5 == 0 else 2 + n % 3)}
        for n in range(37)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, pairs)))
    world_tokenizer_folder = tmp_path / "tokenizer"
    tokenizer().save_pretrained(world_tokenizer_folder)
    data = UnpairedDataModule(
        StreamSource(str(file), window_rows=8), str(world_tokenizer_folder), batch_size=4, max_length=20,
        split=Split(validation=0),
    )  # fmt: skip
    data.setup("fit")
    assert data.label_counts() is None
    loader = data.stream(data.source)
    whole = [batch.input_ids.tolist() for batch in loader]
    assert sum(len(rows) for rows in whole) == 2 * (2 * 37 - 8)
    assert any(number not in loader.begun for number in range(len(whole) // 2))
    for position in range(len(whole)):
        again = data.stream(data.source)
        again.known, again.where = loader.known_at(0, position), lambda position=position: (0, position)
        assert [batch.input_ids.tolist() for batch in again] == whole[position:]


def test_the_worlds_annotators_like_what_is_good():
    world = HHHWorld(seed=0, unpaired=2000, held_out=50)
    rows = world.load("unpaired")
    assert {name: len(part) for name, part in rows.items()} == {"train": 2000, "validation": 50, "ood": 50}
    assert rows["train"][:50] == HHHWorld(seed=0, unpaired=50, held_out=50).load("unpaired")["train"][:]
    labels, gold = torch.tensor(rows["train"]["label"]), torch.tensor(rows["train"]["gold"])
    assert 0.4 < labels.float().mean() < 0.6
    assert (labels == (gold > 0)).float().mean() > 0.9  # noise, taste and lapses
    first = rows["train"][0]
    assert world.gold(first["prompt"], first["completion"][0]["content"]).reward == first["gold"]
    data = UnpairedDataModule(world)
    data.prepare_data()
    data.setup("fit")
    assert data.tokenizer.get_vocab() == world_tokenizer().get_vocab()
    assert sum(data.label_counts()) == 2000
