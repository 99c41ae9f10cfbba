"""Whatever changes a cached result changes its key, setting by setting; a setting that is new must be added here."""

import inspect
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from datasets import Dataset, Features, Value

from rlhf_lightning.callbacks.other_ranks import Cut
from rlhf_lightning.data import cache, files, formats, rankings, steps, tokenization
from rlhf_lightning.data.cache import cached_map, dataset_hash, place_of
from rlhf_lightning.data.columns import ColumnMap, parse_columns
from rlhf_lightning.data.files import ReadOptions, load_files
from rlhf_lightning.data.template_inputs import set_default_variables
from rlhf_lightning.data.tokenization import Tokenization
from rlhf_lightning.errors import UserError


def said(role, content):
    return {"role": role, "content": content}


USER, ANSWER = said("user", "a b"), said("assistant", "c d")
FOLLOWED = [ANSWER, said("user", "e"), said("assistant", "f")]
OTHERWISE = [ANSWER, said("user", "d"), said("assistant", "f f f")]
# Rows of each kind, settings to begin with, and values of every setting that make other rows of these.
KINDS = {
    tokenization.demonstrations: (
        [{"messages": [USER, *FOLLOWED]}, {"messages": [USER, ANSWER]}],
        {"max_length": 12},
        {"mask": ["assistant", "all"], "max_length": [8, 1024], "truncation": ["drop", "error"]},
    ),
    tokenization.preferences: (
        [
            {"prompt": [USER], "chosen": FOLLOWED, "rejected": OTHERWISE},
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [said("assistant", "e")]},
        ],
        {"differing_prompts": "accept"},
        {"max_length": [10], "differing_prompts": ["drop", "error"]},
    ),
    tokenization.unpaired: (
        [{"prompt": "a", "completion": text, "label": True} for text in ("b", "c d e")],
        {},
        {"max_length": [5]},
    ),
    tokenization.prompts: (
        [{"prompt": "a b c"}, {"prompt": "d"}],
        {"max_prompt_length": 3, "long_prompts": "drop"},
        {"max_prompt_length": [1024], "long_prompts": ["error"]},
    ),
    rankings.rankings: (
        [
            {"prompt": [USER], "completions": [FOLLOWED, OTHERWISE, [ANSWER]], "ranks": [1.0, 2.0, 0.0]},
            {"prompt": [USER], "completions": [[ANSWER], [said("assistant", "e")]], "ranks": [1.0, 0.0]},
        ],
        {"differing_prompts": "accept"},
        {"max_length": [13], "differing_prompts": ["drop", "error"]},
    ),
    steps.solutions: (
        [{"prompt": "a", "completions": ["b", "c d"][:n], "labels": [1.0, 0.0][:n]} for n in (1, 2)],
        {"separator": "<assistant>", "max_length": 7},
        {
            "separator": ["<user>"],
            "max_length": [4],
            "long_rows": ["error"],
            "last_step_only": [True],
        },
    ),
}
CHANGES = [
    (make, name, value)
    for make, (_, _, changes) in KINDS.items()
    for name, values in changes.items()
    for value in values
]


def test_every_setting_of_every_tokenization_is_here():
    makers = {
        make
        for module in (tokenization, rankings, steps)
        for _, make in inspect.getmembers(module, inspect.isfunction)
        if make.__module__ == module.__name__
        and inspect.signature(make).return_annotation in (Tokenization, "Tokenization")
    }
    assert makers == set(KINDS)
    for make, (_, _, changes) in KINDS.items():
        assert set(inspect.signature(make).parameters) == {"tokenizer", *changes}, make.__name__


def rows_of(make, tokenizer, settings, folder):
    """The tokenized rows, or what is wrong with them."""
    try:
        return make(tokenizer, **settings).tokenize(Dataset.from_list(KINDS[make][0]), folder).to_list()
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    ("make", "name", "value"), CHANGES, ids=[f"{make.__name__}-{name}-{value}" for make, name, value in CHANGES]
)
def test_a_changed_setting_gives_the_rows_of_an_empty_cache(word, tmp_path, make, name, value):
    settings = KINDS[make][1] | ({"max_length": 4} if name == "long_rows" else {})
    before = rows_of(make, word, settings, tmp_path / "used")
    expected = rows_of(make, word, {**settings, name: value}, tmp_path / "empty")
    assert expected != before
    assert rows_of(make, word, {**settings, name: value}, tmp_path / "used") == expected


def other_template(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace(" <assistant> ", " <assistant> <user> ")


def other_variables(tokenizer):
    set_default_variables(tokenizer, {"name": "a"})


def other_end(tokenizer):
    tokenizer.eos_token = "f"


def other_tokens(tokenizer):
    tokenizer.add_tokens(["a b"])


@pytest.mark.parametrize("change", [other_template, other_variables, other_end, other_tokens])
def test_another_tokenizer_gives_the_rows_of_an_empty_cache(word, tmp_path, change):
    make, settings = tokenization.demonstrations, {"mask": "all"}
    word.chat_template += "{% if name %} {{ name }}{% endif %}"
    before = rows_of(make, word, settings, tmp_path / "used")
    change(word)
    expected = rows_of(make, word, settings, tmp_path / "empty")
    assert expected != before
    assert rows_of(make, word, settings, tmp_path / "used") == expected


def test_a_hash_of_rows_sees_each_of_them_and_their_types():
    """Three blocks of 1,000 rows, the last one short."""
    numbers = list(range(2500))

    def changed(index):
        return [*numbers[:index], -1, *numbers[index + 1 :]]

    found = [dataset_hash(Dataset.from_dict({"n": values})) for values in (numbers, *map(changed, (0, 1500, 2499)))]
    found.append(dataset_hash(Dataset.from_dict({"n": numbers[1:] + numbers[:1]})))
    found.append(dataset_hash(Dataset.from_dict({"m": numbers})))
    found.append(dataset_hash(Dataset.from_dict({"n": numbers}, features=Features({"n": Value("int32")}))))
    assert len(set(found)) == len(found)
    half = Dataset.from_dict({"n": [0, *numbers]}).select(range(1, 2501))
    assert dataset_hash(half) == found[0]  # wherever they came from


def test_rows_are_not_taken_for_those_of_another_type(tmp_path):
    rows = Dataset.from_dict({"n": [1, 2]})
    for kind in ("int32", "float32", "int64"):
        made = cached_map(
            rows,
            lambda batch, _: {"m": batch["n"]},
            features=Features({"m": Value(kind)}),
            settings={},
            cache_dir=tmp_path,
        )
        assert made.features["m"] == Value(kind)


def test_each_source_file_of_the_data_package_is_in_the_key(tmp_path, monkeypatch):
    package = tmp_path / "data"
    shutil.copytree(Path(cache.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "__file__", str(package / "cache.py"))
    found = [place_of({"a": 1}), place_of({"a": 2})]
    for file in sorted(package.rglob("*.py")):
        file.write_text(file.read_text() + "#\n")
        found.append(place_of({"a": 1}))
    assert len(set(found)) == len(found) > 40


class Kept(Exception):
    """Rows would be kept now."""


OPTIONS = {"text_separator": ["", "|"], "mark_bad": [True], "text": [("a",), ("a", "b")]}


@pytest.fixture
def keys(monkeypatch):
    """The keys under which rows are kept."""
    found = []

    def caught(fill, key, given=None):
        found.append(place_of(key))
        raise Kept

    monkeypatch.setattr(files, "cached_rows", caught)
    monkeypatch.setattr(formats, "cached_rows", caught)
    monkeypatch.setattr(formats, "HELD_BYTES", 0)
    return found


def test_every_option_of_reading_and_every_byte_of_a_file_is_in_its_key(tmp_path, keys):
    assert set(OPTIONS) == {field.name for field in fields(ReadOptions)}

    def load(name, **options):
        with pytest.raises(Kept):
            load_files([tmp_path / name], tmp_path, ReadOptions(**options))

    (tmp_path / "a.txt").write_text("one|two")
    load("a.txt")
    for name, values in OPTIONS.items():
        for value in values:
            load("a.txt", **{name: value})
    (tmp_path / "a.jsonl").write_text("one|two")  # read in another way
    load("a.jsonl")
    (tmp_path / "a.txt").write_text("one|twO")
    load("a.txt")
    assert len(set(keys)) == len(keys) == 8
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").rename(tmp_path / "b" / "c.txt")  # its name is not
    load("b/c.txt")
    assert keys[-1] == keys[-2]


MAPPINGS = [
    {"prompt": "q"},
    {"prompt": "q", "completion": "prompt"},
    {"system": None},
    {"messages": "m", "role": "from"},
    {"messages": "m", "role": "from", "content": "text"},
    {"messages": "m", "role": "from", "roles": {"you": "user"}},
    {"messages": "m", "tool_calls": "calls"},
]


def test_format_kind_columns_and_rows_are_in_the_key_of_converted_rows(keys):
    pair = {"prompt": "p", "chosen": "c", "rejected": "r", "completion": "c"}

    def convert(kind="demonstrations", format="preference", row=pair, **settings):
        with pytest.raises(Kept):
            formats.to_canonical(Dataset.from_list([row]), kind, format, **settings)

    convert()
    convert(kind="prompts")
    convert(kind="preferences")
    convert(format="prompt-completion")
    convert(row=pair | {"chosen": "d"})
    convert(columns=parse_columns({"chosen": "rejected", "rejected": "chosen"}))
    assert len(set(keys)) == len(keys) == 6
    convert(origin="elsewhere")
    assert keys[-1] == keys[0]


def test_each_part_of_a_mapping_of_columns_is_in_what_the_key_says_of_it():
    assert all(field.repr for field in fields(ColumnMap))
    found = {repr(parse_columns(mapping)) for mapping in [None, *MAPPINGS]}
    assert len(found) == 1 + len(MAPPINGS)


CUT = {"batch_size": 3, "ranks": 2, "accumulate": 5}


def test_each_number_by_which_a_step_is_cut_counts_in_its_rows():
    assert set(CUT) == {field.name for field in fields(Cut)}
    assert Cut(**CUT).rows() == 30
    found = [Cut(**{**CUT, name: value + 1}).rows() for name, value in CUT.items()]
    assert found == [40, 45, 36]
