"""The same rows in every type of file are the same rows; damaged files are refused in a few lines that name them."""

import csv
import gzip
import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import CASES, SAID, text_rows
from tokenizers_at_hand import TOKENIZERS

from rlhf_lightning.data.files import from_rows
from rlhf_lightning.data.formats import to_canonical
from rlhf_lightning.data.sources import DatasetSource, FileSource
from rlhf_lightning.data.tokenization import tokenize_demonstrations
from rlhf_lightning.errors import UserError

LINES = 11  # of an error: what is wrong, and the first ten rows


def write_files(folder, rows):
    """The rows in every type of file that can hold them."""
    table = from_rows(rows)
    lines = [json.dumps(row, ensure_ascii=number % 2 == 0) for number, row in enumerate(rows)]
    (folder / "r.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "r.json").write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    (folder / "r.jsonl.gz").write_bytes(gzip.compress("\r\n".join(lines).encode()))
    table.to_parquet(folder / "r.parquet")
    table.save_to_disk(folder / "saved")
    (arrow,) = (folder / "saved").glob("*.arrow")
    files = [folder / "r.jsonl", folder / "r.json", folder / "r.jsonl.gz", folder / "r.parquet", arrow]
    if not any(isinstance(value, list | dict) for row in rows for value in row.values()):
        with (folder / "r.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        files.append(folder / "r.csv")
    return files


@pytest.mark.fuzz(4, 100)
def test_the_type_of_file_makes_no_difference(tier, in_process, tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))

    @tier
    @given(case=st.one_of(text_rows(), CASES), more=st.lists(SAID, min_size=1, max_size=3))
    def holds(case, more):
        assume(case.demonstration is not None and not case.disliked)
        rows = [{**case.row, "note": note} for note in more]
        canonical = to_canonical(DatasetSource(from_rows(rows)).load("demonstrations")["train"], "demonstrations")
        tokenized = tokenize_demonstrations(canonical, TOKENIZERS["chatml"], max_length=10**6).to_list()
        for file in write_files(tmp_path_factory.mktemp("files"), rows):
            loaded = to_canonical(FileSource(str(file)).load("demonstrations")["train"], "demonstrations")
            assert loaded.to_list() == canonical.to_list(), file.name
            again = tokenize_demonstrations(loaded, TOKENIZERS["chatml"], max_length=10**6)
            assert again.to_list() == tokenized, file.name

    holds()


def damaged(draw, text):
    """Text with bytes replaced, taken away, doubled, or written as the escape of half a character."""
    raw = bytearray(text.encode())
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(raw)))
        stop = min(len(raw), start + draw(st.integers(0, 3)))
        new = st.binary(max_size=3) | st.sampled_from(
            [b"\\ud800", b'"', b"{", b"[" * 3000, b"\n", b"\n\n", b",", b"9" * 5000]
        )
        raw[start:stop] = draw(new | st.just(bytes(raw[start:stop]) * 2))
    return bytes(raw)


JSON_ROWS = st.lists(CASES.map(lambda case: case.row), min_size=1, max_size=3)


@st.composite
def damaged_files(draw):
    rows = draw(JSON_ROWS)
    if draw(st.booleans()):
        return "bad.jsonl", damaged(draw, "\n".join(json.dumps(row) for row in rows))
    return "bad.json", damaged(draw, json.dumps(rows))


@st.composite
def damaged_tables(draw):
    fields = [draw(st.lists(SAID | st.just(""), min_size=2, max_size=2)) for _ in range(2)]
    lines = [
        ",".join('"' + field.replace('"', '""') + '"' for field in row) for row in [["prompt", "completion"], *fields]
    ]
    return "bad.csv", damaged(draw, "\n".join(lines))


@pytest.mark.fuzz(40, 1400)
def test_damage_is_refused_by_file(tier, tmp_path):
    @tier
    @given(file=st.one_of(damaged_files(), damaged_tables()))
    def holds(file):
        name, raw = file
        path = tmp_path / name
        path.write_bytes(raw)
        told = None
        try:
            rows = FileSource(str(path)).load("prompts")["train"]
            to_canonical(rows, "prompts", origin=str(path))
        except UserError as error:
            told = str(error)
        assert told is None or (str(path) in told.splitlines()[0] and len(told.splitlines()) <= LINES)

    holds()


@pytest.mark.fuzz(30, 500)
def test_a_key_or_column_that_stands_twice_is_refused(tier, tmp_path):
    @tier
    @given(rows=JSON_ROWS, which=st.integers(0, 10**6))
    def holds(rows, which):
        objects = [o for row in rows for o in [row, *objects_in(list(row.values()))] if o]
        chosen = objects[which % len(objects)]
        key = list(chosen)[which % len(chosen)]
        text = "\n".join(twice(row, chosen, key) for row in rows)
        (tmp_path / "twice.jsonl").write_text(text)
        with pytest.raises(UserError, match=r"twice.jsonl, line \d: key .* stands twice"):
            FileSource(str(tmp_path / "twice.jsonl")).load("prompts")

    holds()


def objects_in(value):
    """Every object inside."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [o for v in inner for o in ([v] if isinstance(v, dict) else []) + objects_in(v)]


def twice(value, chosen, key):
    """JSON in which one object has one key twice."""
    if isinstance(value, dict):
        pairs = [f"{json.dumps(k)}: {twice(v, chosen, key)}" for k, v in value.items()]
        return "{" + ", ".join(pairs + ([f'{json.dumps(key)}: "x"'] if value is chosen else [])) + "}"
    return "[" + ", ".join(twice(v, chosen, key) for v in value) + "]" if isinstance(value, list) else json.dumps(value)
