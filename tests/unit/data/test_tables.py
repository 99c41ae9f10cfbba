"""Rows in blocks come back as they were, whatever the blocks hold, in memory and on disk; little of them is in memory."""

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.data import json_files, tables, text_files
from rlhf_lightning.data.cache import cached_rows
from rlhf_lightning.data.formats import to_canonical
from rlhf_lightning.data.json_files import read_json
from rlhf_lightning.data.sources import FileSource
from rlhf_lightning.data.tables import from_rows
from rlhf_lightning.errors import UserError

BIG = 2**60 + 1  # no float64
MIXED = {
    "a column that comes late": [{"a": "x"}, {"a": "y", "b": 1}, {"b": 2, "c": ["z"]}],
    "nothing, then something": [{"a": "x", "b": None}, {"a": "x", "b": []}, {"a": "x", "b": [{"c": 1}]}],
    "whole numbers and fractions": [{"a": 1}, {"a": 2.5}, {"a": None}],
    "numbers no fraction can be": [{"a": BIG}, {"a": 2.5}, {"a": 3}],
    "text that looks like JSON": [{"a": 3}, {"a": "4"}, {"a": "true"}, {"a": None}, {"a": {"b": "5"}}],
    "objects of unlike keys": [{"a": {"b": 1}}, {"a": {"c": 0.1}}, {"a": {}}, {"a": {"b": None}}],
    "lists of unlike objects": [{"a": [{"b": 1}]}, {"a": [{"b": 2, "c": 3}, None]}, {"a": []}],
    "a list beside text": [{"a": ["b"]}, {"a": "b"}, {"a": [1]}],
    "keys with a NUL": [{"a": {"": 1, "\0": 2}}, {"a": {"": 3, "\0": 4}}, {"a": {"b\0c": 1, "b": 2}}],
    "truth is no number": [{"a": True}, {"a": 1}, {"a": 1.0}],
}


def filled(rows):
    """With null where a row lacks a column."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def same(one, other):
    """Equal, and of the same types: 1, 1.0 and True are not."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def as_numbers_of_a_column(rows, name):
    """A column of whole numbers and fractions holds fractions."""
    kinds = {type(row["a"]) for row in rows} - {type(None)}
    return (
        [{"a": None if r["a"] is None else float(r["a"])} for r in rows] if name.startswith("whole") and kinds else rows
    )


@pytest.fixture(params=["in memory", "on disk"])
def block_by_block(request, monkeypatch):
    """A row a block."""
    monkeypatch.setattr(tables, "BLOCK_ROWS", 1)
    monkeypatch.setattr(tables.RowWriter, "first_block", 1)
    monkeypatch.setattr(tables, "HELD_BYTES", 0 if request.param == "on disk" else 2**30)
    return request.param


@pytest.mark.parametrize("name", MIXED)
def test_what_only_later_blocks_show_changes_no_value(block_by_block, name):
    rows = MIXED[name]
    made = cached_rows(lambda writer: writer.extend(rows), {"rows": name})
    assert same(made.to_list(), as_numbers_of_a_column(filled(rows), name))
    assert bool(made.cache_files) == (block_by_block == "on disk")
    assert same(from_rows(rows).to_list(), made.to_list())
    again = cached_rows(lambda writer: pytest.fail("read anew"), {"rows": name}) if made.cache_files else made
    assert same(again.to_list(), made.to_list())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(st.lists(st.dictionaries(st.sampled_from("xy"), JSON, min_size=1), min_size=1, max_size=6), st.integers(1, 4))
def test_any_rows_come_back_whatever_the_blocks(rows, size):
    writer = tables.RowWriter(None)
    for start in range(0, len(rows), size):
        writer.write(rows[start : start + size])
    assert same(tables.Dataset(writer.finish()).to_list(), filled(rows))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_a_list_read_in_pieces_is_what_python_reads_whole(tmp_path, monkeypatch, size):
    rows = [{"a": '\\"]},[ 😀 é', "b": [1.5e-7, -12, {"c": None}]}, {"a": "x" * 90, "d": {}}, {"a": 9007199254740993}]
    (tmp_path / "r.json").write_text(" [ " + " ,\n".join(json.dumps(row, indent=1) for row in rows) + "\n ] \n")
    for module in (json_files, text_files):
        monkeypatch.setattr(module, "CHUNK", size)
    assert list(read_json(tmp_path / "r.json")) == json.loads((tmp_path / "r.json").read_text()) == rows


@pytest.mark.parametrize("size", [1, 5, 100])
@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1},\n {"a": }]', '[{"a": 1}\n {"a": 2}]', '[{"a": 1},]', '[{"a": "b\n"}]', '[{"a": "b', '[{"a": 1}', "[1 2]",
        '[{"a": 1}] x', '[{"a": tru }]', '[{"a": "\\x"}]', '[{"a": "b"},\n\n{"a": "\\u12"}]', '[{"a" 1}]', '[{a: 1}]',
    ],
)  # fmt: skip
def test_damage_is_found_where_python_finds_it(tmp_path, monkeypatch, text, size):
    path = tmp_path / "r.json"
    path.write_text(text)
    for module in (json_files, text_files):
        monkeypatch.setattr(module, "CHUNK", size)
    with pytest.raises(json.JSONDecodeError) as theirs:
        json.loads(text)
    with pytest.raises(UserError) as ours:
        list(read_json(path))
    if text == "[1 2]":  # is no row before it is no JSON
        assert "row 1: a row must be an object" in str(ours.value)
        return
    assert f"{path}, line {theirs.value.lineno}, character {theirs.value.colno}: not JSON" in str(ours.value)


def test_bytes_that_are_no_text_are_named_by_line(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(b'{"a": "b"}\n' * 5000 + '{"a": "é"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"r.jsonl, line 5001: not UTF-8"):
        list(read_json(tmp_path / "r.jsonl"))


def test_columns_of_csv_are_of_the_kind_that_all_lines_agree_on(tmp_path):
    (tmp_path / "r.csv").write_text(
        "prompt,whole,some,code,fraction,truth,odd,large\n"
        "1,1,1,007,1,true,True,9223372036854775807\n"
        "2, -2,,12,.5,FALSE,1,9223372036854775808\n"  # the last fits no column of 64 bits
    )
    one, two = FileSource(str(tmp_path / "r.csv")).load("prompts")["train"].to_list()
    assert list(one.values()) == ["1", 1, 1, "007", 1.0, True, "True", "9223372036854775807"]
    assert list(two.values()) == ["2", -2, None, "12", 0.5, False, "1", "9223372036854775808"]
    assert [type(value) for value in one.values()] == [str, int, int, str, float, bool, str, str]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "txt"])
def test_little_of_a_file_is_in_memory(tmp_path, monkeypatch, ending):
    """8 MB of rows; the bound is what the blocks take, whatever the size of the file."""
    path, texts = tmp_path / f"r.{ending}", [f"{number} " + "word " * 100 for number in range(16_000)]
    lines = {
        "jsonl": lambda: "\n".join(json.dumps({"text": text}) for text in texts),
        "json": lambda: json.dumps([{"text": text} for text in texts]),
        "csv": lambda: "text\n" + "\n".join(texts),
        "txt": lambda: "<|endoftext|>".join(texts),
    }
    path.write_text(lines[ending]())
    for module in (json_files, text_files):
        monkeypatch.setattr(module, "CHUNK", 2**16)
    monkeypatch.setattr(tables, "HELD_BYTES", 2**16)
    monkeypatch.setattr(tables, "BLOCK_BYTES", 2**16)
    monkeypatch.setattr("rlhf_lightning.data.formats.HELD_BYTES", 2**16)
    tracemalloc.start()
    rows = FileSource(str(path)).load("demonstrations")["train"]
    canonical = to_canonical(rows, "demonstrations")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(canonical) == 16_000
    assert canonical[15_999]["text"].strip() == texts[-1].strip()
    assert rows.cache_files
    assert canonical.cache_files
    assert peak < 3e6


def test_a_damaged_table_is_made_anew(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tables, "HELD_BYTES", 0)
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"t {number}"}) for number in range(500)))
    first = FileSource(str(path)).load("prompts")["train"].to_list()
    (arrow,) = (tmp_path / "cache").glob("*/*.arrow")
    assert arrow.name == "500.arrow"
    arrow.write_bytes(arrow.read_bytes()[:3000])
    assert FileSource(str(path)).load("prompts")["train"].to_list() == first
    assert "are damaged" in caplog.text
