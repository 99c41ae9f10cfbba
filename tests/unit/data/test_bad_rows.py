"""Bad rows: found in one pass, listed by file and row, or dropped and counted; and rows that only look bad."""

import json
import logging
import re

import pytest
from datasets import Dataset

from rlhf_lightning.data import tables
from rlhf_lightning.data.demonstrations import DemonstrationDataModule
from rlhf_lightning.data.files import from_rows
from rlhf_lightning.data.formats import to_canonical
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.rows import INDEX
from rlhf_lightning.data.splits import Split, load_splits
from rlhf_lightning.data.streams import StreamSource
from rlhf_lightning.errors import UserError

Q, A = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
TOOLS = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": "no"}'
# A line for each way in which a row can be bad, and what is said of it: in reading, in conversion, in tokenization.
BAD = {
    3: ('{"messages": [}', r"line 3, character 15: not JSON"),
    5: ('{"messages": [{"role": "wizard", "content": "a"}]}', r"row 5 .*role 'wizard'"),
    8: (TOOLS, r"row 8 .*column 'tools' is not JSON"),
    9: ("", r"line 9: an empty line"),
    11: ('{"messages": [], "messages": []}', r"line 11: key 'messages' stands twice"),
    12: ("[1]", r"line 12: a row must be an object"),
    14: ('{"other": 1}', r"row 14 .*column 'messages' is empty"),
}


def lines_of(rows, bad):
    return [bad[number][0] if number in bad else GOOD for number in range(1, rows + 1)]


def module(path, tokenizer, folder, made=DemonstrationDataModule, **settings):
    tokenizer.save_pretrained(folder / "tokenizer")
    return made(path, str(folder / "tokenizer"), **{"split": Split(validation=0), "batch_size": 4, **settings})


def test_all_bad_rows_of_a_file_are_found_in_one_pass(tmp_path, chatml):
    (tmp_path / "r.jsonl").write_text("\n".join(lines_of(20, BAD)))
    data = module(str(tmp_path / "r.jsonl"), chatml, tmp_path, format="messages")
    for _ in range(2):  # tokenized rows are read from the cache the second time
        with pytest.raises(UserError) as error:
            data.prepare_data()
        first, *lines = str(error.value).splitlines()
        assert first == f"{tmp_path}/r.jsonl: 7 of 20 rows are bad; correct them, or set data.bad_rows to drop:"
        assert len(lines) == len(BAD)
        for line, (_, message) in zip(lines, BAD.values(), strict=True):
            assert line.startswith(f"  {tmp_path}/r.jsonl, ")
            assert re.search(message, line), (message, line)


def test_the_first_ten_of_many_are_listed(tmp_path, word):
    wrong = {n: (json.dumps({"messages": [{"role": f"wizard{n}", "content": "a"}]}), "") for n in range(2, 40, 3)}
    (tmp_path / "r.jsonl").write_text("\n".join(lines_of(60, wrong)))
    with pytest.raises(UserError, match=r"13 of 60 rows are bad; .*; the first 10:") as error:
        module(str(tmp_path / "r.jsonl"), word, tmp_path).prepare_data()
    lines = str(error.value).splitlines()[1:]
    assert [line.split(" (")[0].split("row ")[1] for line in lines] == [str(n) for n in range(2, 30, 3)]


def test_one_bad_row_is_one_line_and_what_all_have_is_said_once(tmp_path, word):
    (tmp_path / "r.jsonl").write_text("\n".join(lines_of(6, {4: BAD[5]})))
    with pytest.raises(UserError, match=r"^\S+r.jsonl, row 4 \(read as messages\): .*$") as error:
        module(str(tmp_path / "r.jsonl"), word, tmp_path).prepare_data()
    assert len(str(error.value).splitlines()) == 1
    word.chat_template = "{{ raise_exception('never') }}"
    (tmp_path / "r.jsonl").write_text("\n".join(lines_of(6, {})))
    with pytest.raises(UserError, match=r"row 1 .*never \(and so all 6 rows\)$"):
        module(str(tmp_path / "r.jsonl"), word, tmp_path).prepare_data()


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_bad_rows_are_dropped_and_counted_up_to_a_twentieth(tmp_path, word, caplog, ending):
    rows = [{"prompt": "a", "completion": "b", "n": n} for n in range(40)]
    rows[7]["completion"] = rows[30]["prompt"] = ""
    path = tmp_path / f"r.{ending}"
    if ending == "csv":
        path.write_text(
            "\n".join(["prompt,completion,n", *(f"{r['prompt']},{r['completion']},{r['n']}" for r in rows)])
        )
    elif ending == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows)))
    data = module(str(path), word, tmp_path, bad_rows="drop")
    data.prepare_data()
    assert len(data.rows["train"]) == 38
    assert "dropped 2 of 40 rows, which are bad; the first: " in caplog.text
    assert f"r.{ending}, row 8 (read as prompt-completion): column 'completion' is empty" in caplog.text
    path.write_text("") if ending == "csv" else None
    if ending == "jsonl":
        path.write_text("\n".join([*map(json.dumps, rows), "{"]))
        with pytest.raises(UserError, match=r"3 of 41 rows are bad, more than 5%; correct them"):
            module(str(path), word, tmp_path, bad_rows="drop").prepare_data()


@pytest.mark.parametrize("stage", ["reading", "conversion", "tokenization"])
@pytest.mark.parametrize("kind", [DemonstrationDataModule, PromptDataModule])
def test_a_bad_row_is_dropped_wherever_it_shows(tmp_path, chatml, stage, kind, caplog):
    bad = {"reading": 3, "conversion": 5, "tokenization": 8}[stage]
    (tmp_path / "r.jsonl").write_text("\n".join(lines_of(30, {bad: BAD[bad]})))
    data = module(str(tmp_path / "r.jsonl"), chatml, tmp_path, kind, bad_rows="drop")
    data.prepare_data()
    assert len(data.rows["train"]) == 29
    assert "dropped 1 of 30 rows" in caplog.text
    assert [name for name in data.rows["train"].column_names if name.startswith("__")] == [INDEX]
    assert sorted(data.rows["train"][INDEX]) == [index for index in range(30) if index != bad - 1]


def test_rows_keep_their_file_and_row_through_the_split(tmp_path, chatml):
    """In a folder of files and a validation file too."""
    (tmp_path / "rows").mkdir()
    for name, bad in (("a", {2: BAD[5]}), ("b", {3: (TOOLS, "")})):
        (tmp_path / "rows" / f"{name}.jsonl").write_text("\n".join(lines_of(4, bad)))
    with pytest.raises(UserError) as error:
        module(str(tmp_path / "rows"), chatml, tmp_path, split=Split(validation=0)).prepare_data()
    places = [line.split(" (")[0].strip() for line in str(error.value).splitlines()[1:]]
    assert places == [f"{tmp_path}/rows/a.jsonl, row 2", f"{tmp_path}/rows/b.jsonl, row 3"]
    prompts = "\n".join(
        json.dumps({"prompt": f"a {n}", "completion": "b", "weight": -1 if n == 17 else 1}) for n in range(30)
    )
    (tmp_path / "w.jsonl").write_text(prompts)
    for seed in range(3):  # wherever the row falls
        with pytest.raises(UserError, match=r"w.jsonl, row 18 \('a 17'\.\.\.\): column 'weight' is -1"):
            module(str(tmp_path / "w.jsonl"), chatml, tmp_path, split=Split(0.3, seed)).prepare_data()


def test_large_tables_remember_their_bad_rows(tmp_path, monkeypatch, word, caplog):
    monkeypatch.setattr(tables, "HELD_BYTES", 0)
    monkeypatch.setattr("rlhf_lightning.data.formats.HELD_BYTES", 0)
    (tmp_path / "r.jsonl").write_text("\n".join(lines_of(60, {3: BAD[3], 5: BAD[5]})))
    for _ in range(2):
        caplog.clear()
        data = module(str(tmp_path / "r.jsonl"), word, tmp_path, bad_rows="drop")
        data.prepare_data()
        assert len(data.rows["train"]) == 58
        assert "dropped 2 of 60 rows" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_of_a_stream(tmp_path, chatml, caplog, workers):
    (tmp_path / "r.jsonl").write_text("\n".join(lines_of(300, {n: BAD[n] for n in (3, 5, 8)})))
    source = StreamSource(str(tmp_path / "r.jsonl"), window_rows=64)
    data = module(source, chatml, tmp_path, bad_rows="drop", num_workers=workers)
    data.prepare_data()
    batches = list(data.train_dataloader())
    assert sum(len(batch.input_ids) for batch in batches) == 297
    assert "dropped 3 of 300 rows, which are bad; the first: " in caplog.text
    data = module(source, chatml, tmp_path, num_workers=workers)
    data.prepare_data()
    with pytest.raises(UserError) as error:
        list(data.train_dataloader())
    assert [line.split(", ")[1].split(" (")[0] for line in str(error.value).splitlines()[1:]] == [
        "line 3",
        "row 5",
        "row 8",
    ]


def test_too_many_bad_rows_of_a_stream(tmp_path, chatml):
    (tmp_path / "r.jsonl").write_text("\n".join(lines_of(30, dict.fromkeys((3, 5), BAD[5]))))
    data = module(StreamSource(str(tmp_path / "r.jsonl")), chatml, tmp_path, bad_rows="drop")
    data.prepare_data()
    with pytest.raises(UserError, match="2 of 30 rows are bad, more than 5%"):
        list(data.train_dataloader())


def canonical(row, kind):
    return to_canonical(from_rows([row]), kind).to_list()


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "preferences"),
        ({"prompt": [Q], "chosen": [A], "rejected": [{**A, "content": ""}]}, "preferences"),
        ({"prompt": [Q], "chosen": [A], "rejected": ""}, "preferences"),
        ({"chosen": [Q, A], "rejected": [Q, {**A, "content": ""}]}, "preferences"),
        ({"messages": [Q, A], "rejected_response": ""}, "preferences"),
        ({"prompt": "a", "completion": "", "label": False}, "unpaired"),
        ({"messages": [Q, {**A, "content": ""}], "label": False}, "unpaired"),
        ({"prompt": "a", "completions": ["b", ""], "ranks": [0, 1]}, "rankings"),
        ({"messages": [Q, {**A, "content": "", "reasoning_content": "c"}]}, "demonstrations"),
        ({"messages": [Q, {**A, "content": None, "tool_calls": [{"name": "f", "arguments": {}}]}]}, "demonstrations"),
        ({"messages": [A, Q, A]}, "demonstrations"),
        ({"messages": [A]}, "demonstrations"),
        ({"prompt": [Q, A]}, "prompts"),
        ({"prompt": [Q, A], "completion": [A]}, "demonstrations"),
    ],
)
def test_what_is_legal_is_read(row, kind):
    assert len(canonical(row, kind)) == 1


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "preferences"),
        ({"prompt": "a", "completion": "", "label": True}, "unpaired"),
        ({"prompt": "a", "completion": ""}, "demonstrations"),
        ({"messages": [{**Q, "content": ""}, A]}, "demonstrations"),
    ],
)
def test_what_says_nothing_where_it_must_is_refused(row, kind):
    with pytest.raises(UserError, match="empty"):
        canonical(row, kind)


def test_a_prompt_that_answers_repeat_is_taken_off():
    s, other = {"role": "system", "content": "s"}, {**A, "content": "c"}
    for prompt in ([Q], [s, Q], [Q, A, Q]):
        (pair,) = canonical({"prompt": prompt, "chosen": [*prompt, A], "rejected": [*prompt, other]}, "preferences")
        assert pair == {"prompt": prompt, "chosen": [A], "rejected": [other]}
        (row,) = canonical({"prompt": prompt, "completion": [*prompt, A]}, "demonstrations")
        assert row == {"prompt": prompt, "completion": [A]}
    with pytest.raises(UserError, match="begins with a user message"):
        canonical({"prompt": [Q], "chosen": [{**Q, "content": "x"}, A], "rejected": [other]}, "preferences")


def test_pairs_with_an_empty_side_are_trained_on(word, tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": ""}))
    data = module(str(tmp_path / "r.jsonl"), word, tmp_path, PreferenceDataModule)
    data.prepare_data()
    assert data.rows["train"]["rejected_ids"][:] == [[word.eos_token_id]]


def test_rows_with_one_prompt_are_not_too_few(caplog):
    rows = from_rows([{"prompt": "a", "completion": f"b {n}"} for n in range(4980)])
    with pytest.raises(
        UserError, match=r"all 4980 rows have the same prompt.*give a validation file, or set split\.validation to 0"
    ):
        load_splits(rows, "demonstrations", None, Split())
    with pytest.raises(UserError, match="3 rows are too few to hold out 5% of the prompts"):
        load_splits(from_rows([{"prompt": p, "completion": "c"} for p in "abc"]), "demonstrations", None, Split())


def test_a_limit_draws_its_rows():
    rows = from_rows([{"prompt": f"a {n}", "completion": "b"} for n in range(1000)])

    def kept(**split):
        made = load_splits(rows, "demonstrations", None, Split(validation=0, **split))["train"]
        return [int(prompt.split()[1]) for prompt in made["prompt"]]

    some = kept(limit=50)
    assert len(set(some)) == 50
    assert some == sorted(some) == kept(limit=50)
    assert max(some) > 800  # not the first ones
    assert some != kept(limit=50, seed=1)
    assert kept(limit=5000) == list(range(1000))


def test_many_long_pairs_are_pointed_out(tmp_path, word, caplog):
    caplog.set_level(logging.WARNING)
    for long, said in ((2, False), (3, True)):
        caplog.clear()
        rows = [{"prompt": "a", "chosen": "b " * (9 if n < long else 1), "rejected": "c"} for n in range(20)]
        (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
        module(str(tmp_path / "r.jsonl"), word, tmp_path, PreferenceDataModule, max_length=6).prepare_data()
        assert f"left out {long} of 20 rows: pairs longer than 6 tokens (max_length)" in caplog.text
        assert ("more than a tenth of them: raise data.max_length" in caplog.text) == said
