"""Which columns of a table are read as what, the error that shows it, and columns that are not lost in silence."""

import json
import logging

import pytest
import yaml
from datasets import Dataset

from rlhf_lightning.data.columns import parse_columns
from rlhf_lightning.data.demonstrations import DemonstrationDataModule
from rlhf_lightning.data.formats import to_canonical
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.rankings import RankingDataModule
from rlhf_lightning.data.splits import Split, load_splits
from rlhf_lightning.data.stepwise import StepwiseDataModule
from rlhf_lightning.data.streams import StreamSource
from rlhf_lightning.data.unpaired import UnpairedDataModule
from rlhf_lightning.errors import UserError

WHOLE = Split(validation=0)


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


Q, A, B = [user("a")], [bot("b")], [bot("c")]


def read(rows, kind="demonstrations", columns=None, **settings):
    return load_splits(Dataset.from_list(rows), kind, None, WHOLE, columns, **settings)["train"].to_list()


TABLES = [
    ("demonstrations", {"question": "a", "answer": "b"}, {"prompt": "a", "completion": "b"}),  # GSM8K
    (
        "demonstrations",
        {"prompt": "a", "response": "b", "helpfulness": 4},
        {"prompt": "a", "completion": "b"},
    ),  # HelpSteer
    (
        "demonstrations",  # Dolly
        {"instruction": "a", "context": "c", "response": "b", "category": "qa"},
        {"prompt": [user("a\nc")], "completion": A},
    ),
    (
        "demonstrations",  # OpenOrca
        {"id": "x", "system_prompt": "s", "question": "a", "response": "b"},
        {"prompt": [{"role": "system", "content": "s"}, *Q], "completion": A},
    ),
    ("demonstrations", {"conversation": [*Q, *A]}, {"messages": [*Q, *A]}),
    (
        "demonstrations",
        {"dialogue": [{"speaker": "User", "text": "a"}, {"speaker": "Assistant", "text": "b"}]},
        {"messages": [*Q, *A]},
    ),
    (
        "demonstrations",
        {"chat": [{"who": "Client", "said": "a"}, {"who": "Agent", "said": "b"}]},
        {"messages": [*Q, *A]},
    ),
    ("demonstrations", {"Prompt": "a", "Completion": "b"}, {"prompt": "a", "completion": "b"}),
    ("demonstrations", {"foo": "a", "bar": "b"}, {"prompt": "a", "completion": "b"}),
    ("demonstrations", {"content": "a b"}, {"text": "a b"}),
    (
        "preferences",
        {"prompt": "a", "preferred": "b", "dispreferred": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ),
    ("preferences", {"x": "a", "y": "b", "z": "c"}, {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ("prompts", {"query": "a"}, {"prompt": "a"}),
    ("unpaired", {"question": "a", "answer": "b", "liked": True}, {"prompt": "a", "completion": "b", "label": True}),
    (
        "rankings",
        {"question": "a", "responses": ["b", "c"], "rank": [1, 2]},
        {"prompt": "a", "completions": ["b", "c"], "ranks": [1.0, 2.0]},
    ),
    (
        "stepwise",
        {"question": "a", "steps": ["b", "c"], "labels": [1, 0]},
        {"prompt": "a", "completions": ["b", "c"], "labels": [1.0, 0.0]},
    ),
]


@pytest.mark.parametrize(
    ("kind", "row", "expected"), TABLES, ids=lambda value: "-".join(value) if isinstance(value, dict) else None
)
def test_the_error_shows_three_formats_and_the_mapping_that_helps(kind, row, expected):
    with pytest.raises(UserError, match="unknown format: found columns") as error:
        read([row], kind)
    lines = str(error.value).splitlines()
    assert len(lines) <= 5
    assert len(lines[1].split(": ", 1)[1].split("; ")) == 3
    mapping = yaml.safe_load(lines[2].split("data.columns: ")[1])
    (made,) = read([row], kind, mapping)
    assert {name: made[name] for name in expected} == expected


@pytest.mark.parametrize("spelt", ["User", "USER", " user ", "Human", "human", "prompter"])
@pytest.mark.parametrize("other", ["Assistant", "ASSISTANT", "GPT", "gpt", "model", "Bot"])
def test_roles_whatever_their_case(spelt, other):
    for keys in (("role", "content"), ("from", "value")):
        turns = [dict(zip(keys, turn, strict=True)) for turn in ((spelt, "a"), (other, "b"))]
        assert read([{"messages": turns}]) == [{"messages": [*Q, *A]}]


def test_messages_are_respelt_wherever_they_are():
    columns = {"role": "who", "content": "what", "roles": {"C": "user", "agent": "assistant"}}
    turns = [{"who": "C", "what": "a"}, {"who": "Agent", "what": "b"}, {"who": "AGENT", "what": "c"}]
    pair = {"prompt": turns[:1], "chosen": turns[1:2], "rejected": turns[2]}
    assert read([pair], "preferences", columns) == [{"prompt": Q, "chosen": A, "rejected": B}]
    assert read([{"x": json.dumps(turns[:2])}], columns={**columns, "messages": "x"}) == [{"messages": [*Q, *A]}]
    ranking = {"prompt": turns[:1], "completions": [turns[1:2], turns[2:]], "ranks": [0, 1]}
    assert read([ranking], "rankings", columns)[0]["completions"] == [A, B]


def test_a_swap_a_replaced_column_and_one_that_is_left_out(caplog):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    assert read(rows, "preferences", {"chosen": "rejected", "rejected": "chosen"}) == [
        {"prompt": "a", "chosen": "c", "rejected": "b"}
    ]
    two = [{"prompt": "x", "question": "a", "completion": "b"}]
    assert read(two, columns={"prompt": "question"}) == [{"prompt": "a", "completion": "b"}]
    alpaca = [{"instruction": "a", "system": "s", "output": "b"}]
    assert read(alpaca, columns={"system": None})[0]["prompt"] == Q
    assert read(alpaca)[0]["prompt"] == [{"role": "system", "content": "s"}, *Q]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"promt": "question"}, r"no row format has a column 'promt'; did you mean prompt\?"),
        (
            {"prompt": "questoin"},
            r"columns\.prompt names the column 'questoin': did you mean 'question'\? found question, answer",
        ),
        ({"prompt": 3}, "columns.prompt is 3"),
        ({"prompt": "question", "instruction": "question"}, "gives the column 'question' twice"),
        ({"roles": "user"}, r"columns\.roles is 'user'"),
        (
            {"roles": {"Client": "customer"}},
            r"roles\.Client is 'customer'; a role is one of system, user, assistant, tool",
        ),
        ({"prompt": "question", "context": "answer"}, "column 'context' looks like part of the prompt"),
    ],
)
def test_what_is_wrong_with_a_mapping_is_named(columns, message):
    with pytest.raises(UserError, match=message):
        read([{"question": "a", "answer": "b"}], columns=columns)


MODULES = [
    (DemonstrationDataModule, {"q": "a", "r": "b"}, {"prompt": "q", "completion": "r"}, "input_ids"),
    (
        PreferenceDataModule,
        {"q": "a", "r": "b", "s": "c"},
        {"prompt": "q", "chosen": "r", "rejected": "s"},
        "chosen_ids",
    ),
    (PromptDataModule, {"q": "a"}, {"prompt": "q"}, "prompt_ids"),
    (
        UnpairedDataModule,
        {"q": "a", "r": "b", "l": True},
        {"prompt": "q", "completion": "r", "label": "l"},
        "completion_ids",
    ),
    (
        RankingDataModule,
        {"q": "a", "r": ["b", "c"], "l": [1, 2]},
        {"prompt": "q", "completions": "r", "ranks": "l"},
        "ranks",
    ),
    (
        StepwiseDataModule,
        {"q": "a", "r": ["b", "c"], "l": [1, 0]},
        {"prompt": "q", "completions": "r", "labels": "l"},
        "labels",
    ),
]


@pytest.mark.parametrize(
    ("module", "row", "columns", "column"), MODULES, ids=lambda value: getattr(value, "__name__", None)
)
@pytest.mark.parametrize("streamed", [False, True])
def test_every_data_module_takes_columns(tmp_path, word, module, row, columns, column, streamed):
    word.save_pretrained(tmp_path / "word")
    rows = [row, {**row, "l": False} if module is UnpairedDataModule else row]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "theirs.jsonl").write_text("\n".join(json.dumps({k: r[v] for k, v in columns.items()}) for r in rows))
    made = []
    for name, mapping in (("mine", columns), ("theirs", None)):
        path = str(tmp_path / f"{name}.jsonl")
        settings = {"separator": "<assistant>"} if module is StepwiseDataModule else {}
        source = StreamSource(path) if streamed else path
        data = module(source, str(tmp_path / "word"), columns=mapping, split=WHOLE, batch_size=2, **settings)
        data.prepare_data()
        batch = next(iter(data.train_dataloader()))
        fields = batch._asdict() if hasattr(batch, "_asdict") else vars(batch)
        made.append({k: v.tolist() if hasattr(v, "tolist") else v for k, v in fields.items()})
        if not streamed:
            assert column in data.rows["train"].column_names
    assert made[0] == made[1]


def test_columns_of_a_mapping_are_validated_before_anything_is_read():
    with pytest.raises(UserError, match=r"data\.columns\.prompt is 3"):
        DemonstrationDataModule("nowhere.jsonl", columns={"prompt": 3})


@pytest.mark.parametrize(("name", "mark"), [("r.tsv", "\t"), ("r.csv", ";"), ("r.csv", "\t"), ("r.csv", ",")])
def test_tabs_and_semicolons_divide_fields(tmp_path, name, mark):
    lines = [["question", "answer, or not"], ["a, b; c", "007"], ['say "x"', "12"]]
    text = "\n".join(mark.join('"' + field.replace('"', '""') + '"' for field in line) for line in lines)
    (tmp_path / name).write_text(text)
    columns = {"prompt": "question", "completion": "answer, or not"}
    rows = load_splits(str(tmp_path / name), "demonstrations", None, WHOLE, columns)["train"]
    assert rows.to_list() == [{"prompt": "a, b; c", "completion": "007"}, {"prompt": 'say "x"', "completion": "12"}]


def test_numbers_of_a_mapped_csv_column_stay_text(tmp_path):
    (tmp_path / "r.csv").write_text("question,answer,liked\n1,2,true\n3,4.50,false\n5,,false\n")
    columns = {"prompt": "question", "completion": "answer", "label": "liked"}
    rows = load_splits(str(tmp_path / "r.csv"), "unpaired", None, WHOLE, columns)["train"]
    assert [(r["prompt"], r["completion"], r["label"]) for r in rows] == [
        ("1", "2", True),
        ("3", "4.50", False),
        ("5", "", False),
    ]


LOST = [
    ("preferences", {"system": "kept words", "input": "a", "chosen": "a b", "rejected": "a c"}, "(system|input)"),
    (
        "preferences",
        {"system": "kept words", "question": "kept words", "chosen": "a b", "rejected": "a c"},
        "(system|question)",
    ),
    ("preferences", {"prompt": "a", "system": "kept words", "chosen": "b", "rejected": "c"}, "system"),
    ("demonstrations", {"prompt": "a", "context": "kept words", "completion": "b"}, "context"),
    ("demonstrations", {"prompt": "a", "Input": "kept words", "completion": "b"}, "Input"),
    ("demonstrations", {"prompt": "a", "history": [["kept words", "y"]], "completion": "b"}, "history"),
    ("demonstrations", {"instruction": "a", "output": "b", "system_prompt": "kept words"}, "system_prompt"),
    ("unpaired", {"prompt": "a", "system": "kept words", "completion": "b", "label": True}, "system"),
    ("prompts", {"prompt": "a", "system": "kept words"}, "system"),
    ("prompts", {"prompt": "a", "images": ["x.png"]}, "images"),
    ("demonstrations", {"messages": [*Q, *A], "images": ["x.png"]}, "images"),
    ("demonstrations", {"prompt": "a", "completion": "b", "audio": {"path": "x.wav"}}, "audio"),
    ("demonstrations", {"text": "a", "video": "x.mp4"}, "video"),
]


@pytest.mark.parametrize(("kind", "row", "column"), LOST)
def test_a_column_that_means_something_is_not_lost(kind, row, column):
    with pytest.raises(UserError, match=f"column '{column}' (looks like part of the prompt|holds media)") as error:
        read([row], kind)
    mappings = [part.split("} ")[0] + "}" for part in str(error.value).split("data.columns: ")[1:]]
    for text in mappings:  # each of those that it shows helps
        mapping = yaml.safe_load(text)
        others = {name: None for name in ("system", "question") if None in mapping.values() and name in row}
        (made,) = read([row], kind, {**others, **mapping})
        if None not in mapping.values():
            assert "kept words" in json.dumps(made)
    assert mappings


def test_a_text_that_is_said_elsewhere_or_empty_is_not_lost(caplog):
    caplog.set_level(logging.INFO)
    rows = [
        {
            "prompt": "Solve: a  b",
            "question": "a b",
            "context": "",
            "images": [],
            "system": None,
            "completion": "c",
            "id": 3,
        },
        {"prompt": "d", "question": None, "context": None, "images": None, "system": "", "completion": "c", "id": 4},
    ]
    assert [row["prompt"] for row in read(rows)] == ["Solve: a  b", "d"]
    assert caplog.text.count("columns that are not used: question, context, images, id") == 1
    with pytest.raises(UserError, match="column 'question' looks like"):  # in any row
        read([*rows, {**rows[1], "question": "e"}])


def test_system_prompts_are_used_wherever_the_prompt_is_messages():
    s = [{"role": "system", "content": "s"}]
    for kind, row, column in [
        ("demonstrations", {"prompt": Q, "completion": A}, "prompt"),
        ("preferences", {"prompt": Q, "chosen": A, "rejected": B}, "prompt"),
        ("preferences", {"chosen": [*Q, *A], "rejected": [*Q, *B]}, "prompt"),
        ("unpaired", {"prompt": Q, "completion": A, "label": True}, "prompt"),
        ("prompts", {"prompt": Q}, "prompt"),
        ("rankings", {"prompt": Q, "completions": [A, B], "ranks": [0, 1]}, "prompt"),
    ]:
        assert read([{**row, "system": "s"}], kind)[0][column] == [*s, *Q], kind
    for row, kind in [
        ({"prompt": [*s, *Q]}, "prompts"),
        ({"chosen": [*s, *Q, *A], "rejected": [*s, *Q, *B]}, "preferences"),
        ({"messages": [*s, *Q, *A]}, "demonstrations"),
    ]:
        assert read([{**row, "system": "s"}], kind) == read([row], kind)  # said twice
        with pytest.raises(UserError, match="column 'system' and the system message of the conversation differ"):
            read([{**row, "system": "t"}], kind)


def test_tools_and_template_arguments_are_used_columns(caplog):
    caplog.set_level(logging.INFO)
    rows = [
        {"prompt": Q, "completion": A, "tools": "[]", "chat_template_kwargs": {"x": True}, "weight": 2.0, "other": 1}
    ]
    (row,) = read(rows)
    assert (row["tools"], row["chat_template_kwargs"]) == ("[]", {"x": True})
    assert "columns that are not used: other\n" in caplog.text
    read([{"prompt": Q, "solution": "x"}], "prompts")
    assert "reward functions get the columns solution" in caplog.text


def test_a_ranked_list_names_the_rankings_format():
    with pytest.raises(
        UserError, match=r"list of 2 texts where one belongs.* format ordering, with columns prompt, completions"
    ):
        read([{"instruction": "a", "output": ["b", "c"]}])


def test_a_mapping_given_is_part_of_the_one_that_is_shown():
    rows = [{"q": "a", "system": "s", "r": "b"}]
    with pytest.raises(UserError, match="column 'system'") as error:
        read(rows, columns={"prompt": "q", "completion": "r"})
    mapping = yaml.safe_load(str(error.value).split("data.columns: ")[1].split("} ")[0] + "}")
    assert read(rows, columns=mapping) == [{"prompt": [{"role": "system", "content": "s"}, *Q], "completion": A}]


def test_a_format_that_is_named_may_ignore_text():
    rows = Dataset.from_list([{"prompt": "a", "text": "b c"}])
    assert to_canonical(rows, "demonstrations", "text").to_list() == [{"text": "b c"}]


def test_a_parsed_mapping_is_plain():
    assert parse_columns(None) == parse_columns({})
    assert parse_columns({"prompt": "q", "x": None, "role": "who"}).names == {"prompt": "q"}
