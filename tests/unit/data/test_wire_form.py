"""Tool calls as JSON text, conversations in CSV cells, and the null keys that Arrow adds to objects."""

import csv
import json

import pytest
from datasets import Dataset, DatasetDict

from rlhf_lightning.data.demonstrations import DemonstrationDataModule
from rlhf_lightning.data.files import from_rows
from rlhf_lightning.data.formats import to_canonical
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.sources import DatasetSource, FileSource, Source
from rlhf_lightning.data.splits import Split
from rlhf_lightning.data.streams import StreamSource
from rlhf_lightning.errors import UserError

Q, A, B = ({"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("assistant", "c")))
WHOLE = Split(validation=0)
# Writes everything that a template can see of a call or a tool, keys in their order.
TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def call(arguments, name="f"):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls):
    return {"role": "assistant", "content": "", "tool_calls": list(calls)}


def written(path, rows):
    """The rows as a file of the type that its name says."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".arrow":
        Dataset.from_list(rows).save_to_disk(path.with_suffix(""))
        (file,) = path.with_suffix("").glob("*.arrow")
        file.rename(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def canonical(rows, kind="demonstrations"):
    return to_canonical(from_rows(rows), kind).to_list()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ('{"city": "Oslo", "days": [1, null]}', {"city": "Oslo", "days": [1, None]}),
        ('{"b": 1, "a": 2}', {"b": 1, "a": 2}),
        ("{}", {}),
        ("Oslo", "Oslo"),
        ('"Oslo"', '"Oslo"'),
        ("{city: Oslo}", "{city: Oslo}"),
        ('{"x": NaN}', '{"x": NaN}'),
        ("", ""),
    ],
)
def test_arguments_in_json_text_are_objects(given, expected):
    (row,) = canonical([{"messages": [Q, calling(call(given)), {"role": "tool", "content": '{"x": 1}'}, A]}])
    assert row["messages"][1]["tool_calls"] == [call(expected)]
    assert row["messages"][2]["content"] == '{"x": 1}'  # a result is text
    (pair,) = canonical([{"prompt": [Q], "chosen": [calling(call(given))], "rejected": [A]}], "preferences")
    assert pair["chosen"][0]["tool_calls"] == [call(expected)]


@pytest.mark.parametrize(
    "message",
    [
        calling({"name": "f", "arguments": '{"x": 1}'}),  # without "function"
        {"role": "assistant", "content": None, "tool_calls": json.dumps([{"name": "f", "arguments": {"x": 1}}])},
        {"role": "assistant", "content": None, "tool_calls": {"name": "f", "arguments": '{"x": 1}'}},
    ],
)
def test_other_spellings_of_tool_calls(message):
    (row,) = canonical([{"messages": [Q, message]}])
    assert row["messages"][1]["tool_calls"] == [{"name": "f", "arguments": {"x": 1}}]


def test_a_function_call_is_a_tool_call():
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    (row,) = canonical([{"messages": [Q, old, {"role": "function", "name": "f", "content": "3"}, A]}])
    assert row["messages"][1:3] == [calling(call({"x": 1})), {"role": "tool", "name": "f", "content": "3"}]


def prompts_of(source, tokenizer, folder, module=PromptDataModule, **settings):
    """What the model reads of each row."""
    tokenizer.chat_template = TOOLS
    tokenizer.save_pretrained(folder / "tokenizer")
    data = module(source, str(folder / "tokenizer"), split=WHOLE, **settings)
    data.prepare_data()
    column = "input_ids" if module is DemonstrationDataModule else "prompt_ids"
    return [data.tokenizer.decode(ids) for ids in data.rows["train"][column]]


SCHEMA = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}},
}
OTHER = {
    "type": "function",
    "function": {"name": "g", "parameters": {"type": "object", "properties": {"y": {"enum": ["a"]}}}},
}


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "arrow", "dataset"])
def test_rows_get_no_key_of_other_rows(tmp_path, chatml, ending):
    rows = [
        {"messages": [Q, calling(call({"x": 1})), A], "tools": [SCHEMA]},
        {"messages": [Q, calling(call({"y": {"z": ["b"]}}, "g")), A], "tools": [OTHER]},
        {"messages": [Q, A], "tools": []},
    ]
    path = tmp_path / f"rows.{ending}"
    source = DatasetSource(Dataset.from_list(rows)) if ending == "dataset" else written(path, rows)
    texts = prompts_of(source, chatml, tmp_path, DemonstrationDataModule, mask="all")
    assert not any("null" in text for text in texts)
    for text, row in zip(texts, rows, strict=True):
        for message in row["messages"]:
            for one in message.get("tool_calls", []):
                assert json.loads(text[text.index("<assistant>") + len("<assistant>") :].split("<|im_end|>")[0]) == one
        if row["tools"]:
            assert json.JSONDecoder().raw_decode(text)[0] == row["tools"]


def test_prompts_and_pairs_get_no_key_of_other_rows(tmp_path, chatml):
    rows = [
        {
            "prompt": [Q, calling(call({"x": 1})), {"role": "tool", "content": "3"}],
            "chosen": [A],
            "rejected": [B],
            "tools": [SCHEMA],
        },
        {
            "prompt": [Q, calling(call({"y": 2})), {"role": "tool", "content": "3"}],
            "chosen": [A],
            "rejected": [B],
            "tools": [OTHER],
        },
    ]
    path = written(tmp_path / "rows.parquet", rows)
    for module in (PreferenceDataModule, PromptDataModule):
        assert not any("null" in text for text in prompts_of(path, chatml, tmp_path, module))
    data = PromptDataModule(path, str(tmp_path / "tokenizer"), split=WHOLE)
    data.prepare_data()
    assert data.rows["train"]["tools"][:] == [row["tools"] for row in rows]  # what reward functions get


def test_rows_of_a_stream_get_no_key_of_other_rows(tmp_path, chatml):
    rows = [
        {"prompt": [Q], "tools": [SCHEMA], "answer": {"x": 1}},
        {"prompt": [Q], "tools": [OTHER], "answer": {"y": 2}},
    ]
    written(tmp_path / "rows.parquet", rows)
    chatml.chat_template = TOOLS
    chatml.save_pretrained(tmp_path / "tokenizer")
    data = PromptDataModule(StreamSource(str(tmp_path / "rows.parquet")), str(tmp_path / "tokenizer"), 2, split=WHOLE)
    data.prepare_data()
    (batch,) = data.train_dataloader()
    assert sorted(batch.columns["answer"], key=str) == [{"x": 1}, {"y": 2}]
    assert not any("null" in chatml.decode(ids) for ids in batch.input_ids)


def test_nulls_that_a_file_has_are_kept(tmp_path):
    rows = [
        {"messages": [Q, calling(call({"x": x, "y": {"z": None}})), A], "tools": None, "kept": {"a": x}}
        for x in (None, 1)
    ]
    loaded = FileSource(written(tmp_path / "rows.jsonl", rows)).load("demonstrations")["train"]
    assert loaded.to_list() == rows
    made = to_canonical(loaded, "demonstrations")
    assert [row["messages"][1]["tool_calls"] for row in made] == [[call({"x": x, "y": {"z": None}})] for x in (None, 1)]
    assert made["kept"][:] == [{"a": None}, {"a": 1}]
    one = FileSource(written(tmp_path / "one.jsonl", rows[:1])).load("demonstrations")["train"]
    assert to_canonical(one, "demonstrations")[0]["messages"][1]["tool_calls"] == [call({"x": None, "y": {"z": None}})]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": [Q, A]}, "demonstrations"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "demonstrations"),
        ({"prompt": [Q], "completion": [A]}, "demonstrations"),
        ({"prompt": [Q], "chosen": [A], "rejected": [B]}, "preferences"),
        ({"chosen": [Q, A], "rejected": [Q, B]}, "preferences"),
        ({"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2]}, "rankings"),
        ({"prompt": "a", "completions": ["b", "c"], "labels": [True, None]}, "stepwise"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "demonstrations"),
        ({"context": [Q], "completions": [{"rank": 0, "completion": "b"}, {"rank": 1, "completion": "c"}]}, "rankings"),
        ({"prompt": [Q], "tools": [SCHEMA]}, "prompts"),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_cells_of_json_text_are_read(tmp_path, row, kind, ending):
    """Also from Parquet that holds JSON text."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
    loaded = FileSource(written(tmp_path / f"rows.{ending}", [texts] * 2)).load(kind)["train"]
    expected = {name: json.dumps(value) if name == "tools" else value for name, value in row.items()}
    made = to_canonical(loaded, kind).to_list()
    assert made == [
        {**new, **{k: v for k, v in expected.items() if k == "tools"}} for new in canonical([row] * 2, kind)
    ]


def test_text_that_looks_like_json_is_text():
    rows = [
        {"instruction": "Sort", "input": '{"b": 1}', "output": '["a"]'},
        {"instruction": "a", "input": "", "output": "{}"},
    ]
    first, second = canonical(rows)
    assert first["prompt"][0]["content"] == 'Sort\n{"b": 1}'
    assert (first["completion"][0]["content"], second["completion"][0]["content"]) == ('["a"]', "{}")
    assert canonical([{"prompt": "[1, 2]", "completion": '{"role": 1}'}]) == [
        {"prompt": "[1, 2]", "completion": '{"role": 1}'}
    ]


def test_pythons_spelling_of_a_list_is_named(tmp_path):
    rows = FileSource(written(tmp_path / "r.csv", [{"messages": str([Q, A])}])).load("demonstrations")["train"]
    with pytest.raises(
        UserError, match=r"r\.csv, row 1 .*Python's spelling of a list, not JSON; write it with json\.dumps"
    ):
        to_canonical(rows, "demonstrations")


@pytest.mark.parametrize(
    "content", ["a b", ["a b"], [{"type": "text", "value": "a b"}], [{"type": "text", "text": "a"}, " b"]]
)
def test_text_parts_under_any_key_are_text(content):
    for spelling in ({"role": "user", "content": content}, {"from": "human", "value": content}):
        assert canonical([{"messages": [spelling, A]}])[0]["messages"][0] == {"role": "user", "content": "a b"}


def test_an_image_part_is_named():
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": "x"}, {"type": "text", "text": "a"}]},
            A,
        ]
    }
    with pytest.raises(UserError, match="image_url parts are not supported"):
        canonical([row])


class Hub(Source):
    """Rows as the hub has them: one struct for all."""

    def load(self, kind):
        return DatasetDict(
            {
                "train": Dataset.from_list(
                    [{"messages": [Q, calling(call({"x": 1}))]}, {"messages": [Q, calling(call({"y": 1}))]}]
                )
            }
        )


def test_large_tables_are_cleaned_on_disk_too(tmp_path, monkeypatch, chatml):
    monkeypatch.setattr("rlhf_lightning.data.formats.HELD_BYTES", 0)
    monkeypatch.setattr("rlhf_lightning.data.tables.HELD_BYTES", 0)
    for _ in range(2):  # the second time from the cache
        texts = prompts_of(Hub(), chatml, tmp_path, DemonstrationDataModule, mask="all")
        assert ['"x": 1' in text for text in texts] == [True, False]
        assert not any("null" in text for text in texts)
