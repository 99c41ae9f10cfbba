"""Every kind of file gives the same rows; every kind of damage is named by file and line."""

import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from rlhf_lightning.data.sources import DatasetSource, FileSource, HubSource, Source, as_source
from rlhf_lightning.errors import UserError

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "None"}]


def write_lines(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.write("\n".join(json.dumps(row) for row in rows) + "\n\n")  # a blank line at the end does no harm
    return path


def write(path):
    rows = Dataset.from_list(ROWS)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return write_lines(path, ROWS)
    if path.suffix == ".csv":
        rows.to_csv(path)
    elif path.suffix == ".parquet":
        rows.to_parquet(path)
    elif path.suffix == ".arrow":
        rows.save_to_disk(path.parent / "saved")
        return path.parent / "saved" / "data-00000-of-00001.arrow"
    else:
        text = json.dumps(ROWS, indent=2)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["r.json", "r.jsonl", "r.json.gz", "r.jsonl.gz", "r.csv", "r.parquet", "r.arrow"])
def test_every_file_type_gives_the_same_rows(tmp_path, name):
    loaded = as_source(str(write(tmp_path / name))).load("demonstrations")
    assert set(loaded) == {"train"}
    assert loaded["train"].to_list() == ROWS  # the answer "None" is text


def test_folders(tmp_path):
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "two")
    (tmp_path / "three").mkdir()
    write_lines(tmp_path / "three" / "train.jsonl", ROWS)
    write_lines(tmp_path / "three" / "validation.jsonl", ROWS[:1])
    assert FileSource(str(tmp_path / "one")).load("prompts")["train"].to_list() == ROWS
    assert FileSource(str(tmp_path / "two")).load("prompts")["validation"].to_list() == ROWS[1:]
    three = FileSource(str(tmp_path / "three")).load("prompts")
    assert (three["train"].to_list(), three["validation"].to_list()) == (ROWS, ROWS[:1])


def test_stories_are_split_at_the_separator(tmp_path):
    path = tmp_path / "s.txt"
    path.write_text("One.\n\nTwo.\n<|endoftext|>\nThree.\n<|endoftext|>\n")
    assert FileSource(str(path)).load("demonstrations")["train"]["text"][:] == ["One.\n\nTwo.", "Three."]
    paragraphs = FileSource(str(path), text_separator=None).load("demonstrations")["train"]["text"][:]
    assert paragraphs[0] == "One."


def test_validation_file(tmp_path):
    train, held_out = write_lines(tmp_path / "t.jsonl", ROWS), write_lines(tmp_path / "v.jsonl", ROWS[:1])
    assert len(FileSource(str(train), validation_path=str(held_out)).load("prompts")["validation"]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}\n{"text": "b"\n', r"bad.jsonl, line 2, character \d+: not JSON"),
        ('{"text": "a"}\n\n{"text": "b"}\n', r"line 2: an empty line between rows"),
        ('{"text": "a"}\n{}\n', r"line 2: the row is empty"),
        ('{"text": "a"}\n{"text": null}\n', r"line 2: the row is empty; columns text"),
        ('{"text": "a"}\n["b"]\n', r"line 2: a row must be an object"),
        ('[{"text": "a"},\n {"text": }]', r"line 2, character \d+: not JSON"),
        ('[{"text": "a"}, 3]', r"row 2: a row must be an object"),
        ("", "is empty"),
        ("\n\n", "bad.jsonl"),
        ("[]", "bad.jsonl"),
    ],
)
def test_damage_is_named_by_file_and_line(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        FileSource(str(path)).load("demonstrations")
    assert "\n" not in str(error.value).strip()
    assert str(path) in str(error.value)


def test_other_damage(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no parquet")
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\nc,d,e\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 100)[:-12])
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}\n'.encode("latin-1"))
    (tmp_path / "a.pkl").write_bytes(b"x")
    (tmp_path / "nothing").mkdir()
    cases = {
        "a.parquet": "parquet",
        "a.csv": "line 3",
        "a.jsonl.gz": "gzip",
        "latin.jsonl": "UTF-8",
        "a.pkl": "accepted are",
        "nothing": "no data",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            FileSource(str(tmp_path / name)).load("prompts")


def test_as_source(tmp_path):
    rows = Dataset.from_list(ROWS)
    assert isinstance(as_source(rows), DatasetSource)
    assert as_source(DatasetDict({"train": rows, "ood": rows})).load("prompts")["ood"].to_list() == ROWS
    hub = as_source("owner/name")
    assert isinstance(hub, HubSource)
    assert as_source(hub) is hub
    assert hub.tokenizer() is None
    for missing in ("data/rows.jsonl", "./owner/name", "/no/such/folder", "rows"):
        with pytest.raises(UserError, match=rf"{missing} does not exist \(working directory"):
            as_source(missing)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"hub dataset 'owner/no-such-set'.*check the name and the connection"):
        HubSource("owner/no-such-set").load("prompts")


def test_a_source_of_ones_own():
    class Mine(Source):
        def load(self, kind):
            return DatasetDict({"train": Dataset.from_list(ROWS)})

    mine = Mine()
    assert as_source(mine) is mine
