"""Files that readers guess at, or read in part: every type gives what was written, or is refused by line."""

import json

import pandas
import pytest
from datasets import Dataset

from rlhf_lightning.data.formats import to_canonical
from rlhf_lightning.data.sources import FileSource
from rlhf_lightning.errors import UserError

GUESSED = [
    {"prompt": "2020-01-01", "completion": "42"},
    {"prompt": "2021-02-03 04:05:06", "completion": "007"},
    {"prompt": "True", "completion": "False"},
    {"prompt": "NA", "completion": "null"},
    {"prompt": "1e5", "completion": "a\r\nb\x00c"},
]


def load(path):
    return FileSource(str(path)).load("demonstrations")["train"]


def write(path, rows):
    if path.suffix == ".csv":
        pandas.DataFrame(rows).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("some", [GUESSED, GUESSED[:1], GUESSED[:2], GUESSED[2:3]])
@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_text_that_looks_like_dates_numbers_and_truth_is_text(tmp_path, monkeypatch, some, ending):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    assert load(write(tmp_path / f"r.{ending}", some)).to_list() == some
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / f"train.{ending}", some)
    assert load(tmp_path / "folder").to_list() == some


def test_numbers_and_labels_of_csv_are_numbers_and_labels(tmp_path):
    (tmp_path / "r.csv").write_text("prompt,completion,label,margin,answer\nq,a,True,0.5,3\nr,,False,,4\n")
    first, second = load(tmp_path / "r.csv")
    assert first == {"prompt": "q", "completion": "a", "label": True, "margin": 0.5, "answer": 3}
    assert second == {"prompt": "r", "completion": "", "label": False, "margin": None, "answer": 4}  # it says nothing


def test_columns_of_an_agents_trace_are_columns_like_others(tmp_path):
    row = {"id": "1", "source": "s", "model": "m", "system_prompt": "p", "messages": [{"role": "user", "content": "q"}]}
    assert load(write(tmp_path / "r.jsonl", [row])).to_list() == [row]


def test_folders_of_stories_are_split_like_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"One {name}.\n\nTwo.\n<|endoftext|>\nThree.\n")
    assert load(tmp_path)["text"][:] == ["One a.\n\nTwo.", "Three.", "One b.\n\nTwo.", "Three."]


def test_columns_that_only_later_rows_have_are_kept(tmp_path):
    rows = load(write(tmp_path / "r.jsonl", [{"prompt": "a"}, {"prompt": "b", "note": "n"}]))
    assert rows.to_list() == [{"prompt": "a", "note": None}, {"prompt": "b", "note": "n"}]


DEEP = "[" * 3000 + "]" * 3000


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.jsonl", '{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}', r"line 2: key 'prompt' stands twice"),
        ("r.json", '[{"prompt": "a", "prompt": "b"}]', r"r.json, row 1: key 'prompt' stands twice"),
        (
            "r.jsonl",
            '{"prompt": [{"role": "user", "role": "system", "content": "x"}]}',
            r"line 1: key 'role' stands twice",
        ),
        ("r.csv", "prompt,completion,prompt\na,b,c\n", r"line 1: column 'prompt' stands twice"),
        ("r.csv", "prompt,completion\na,b,\nc,d,\n", r"line 2: 3 fields where the header has 2"),  # not an index
        ("r.csv", f"prompt,completion\n{'a' * 200_000},b\nc\n", r"line 3: 1 fields where the header has 2"),
        ("r.csv", "prompt,completion\n\n", r"r.csv has no rows"),
        ("r.json", '[{"prompt": "a"}, {"prompt": "a\\ud800b"}]', r"row 2: '\\ud800' is half of a surrogate pair"),
        ("r.jsonl", '{"prompt": "a\\uDC00b"}', r"line 1: '\\udc00' is half of a surrogate pair"),
        ("r.jsonl", f'{{"prompt": "a", "x": {DEEP}}}', r"line 1: .*nested too deeply"),
        ("r.jsonl", f'{{"prompt": "a", "x": {"9" * 5000}}}', r"line 1: 9{30} is too large a number"),
        ("r.jsonl", f'{{"prompt": "a", "x": {2**63}}}', r"line 1: 9223372036854775808 is too large a number"),
    ],
)
def test_what_other_readers_lose_or_crash_at_is_refused_by_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert len(str(error.value)) < 400


def test_whole_surrogate_pairs_and_the_largest_numbers_are_read(tmp_path):
    (tmp_path / "r.jsonl").write_text(f'{{"prompt": "\\ud83d\\ude00", "x": {2**63 - 1}, "y": {-(2**63)}}}')
    assert load(tmp_path / "r.jsonl").to_list() == [{"prompt": "😀", "x": 2**63 - 1, "y": -(2**63)}]


def test_messages_quote_no_line_ends(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"a\\nb": "x"}')
    with pytest.raises(UserError) as error:
        to_canonical(load(tmp_path / "r.jsonl"), "prompts", origin="r.jsonl")
    assert "found columns a\\nb" + "\n" in str(error.value)
