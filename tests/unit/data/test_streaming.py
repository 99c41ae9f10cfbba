"""Streams: the batches of a loader over all rows, window by window, on any rank, with any workers, from any batch on."""

import gzip
import json
import random
from functools import partial
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import Timer

from rlhf_lightning.data import chunks
from rlhf_lightning.data.chunks import make_reading
from rlhf_lightning.data.collate import PreferenceCollator, PromptCollator, SequenceCollator
from rlhf_lightning.data.demonstrations import DemonstrationDataModule
from rlhf_lightning.data.limits import numbers
from rlhf_lightning.data.loaders import Placement, make_loader
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.splits import Split
from rlhf_lightning.data.streaming import Known, StreamLoader, check_stream
from rlhf_lightning.data.streams import StreamSource
from rlhf_lightning.data.tokenization import demonstrations, preferences, prompts, tokenize_demonstrations
from rlhf_lightning.errors import UserError

ROWS = 203
COLLATORS = {"demonstrations": SequenceCollator, "preferences": PreferenceCollator, "prompts": PromptCollator}


def said(generator):
    return " ".join(generator.choices("abcdef", k=generator.randint(1, 12)))


@pytest.fixture
def rows():
    generator = random.Random(0)
    return [{"prompt": said(generator), "completion": said(generator), "id": number} for number in range(ROWS)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 10)


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    text = "\n".join(map(json.dumps, rows))
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path, batch_size=17)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else text)
    return str(path)


@pytest.fixture
def folder(tmp_path, rows):
    """Files of several types, in the order of their names."""
    cuts = [0, 1, 60, 130, 150, ROWS]
    names = ["a.jsonl", "b.parquet", "c.json", "d.jsonl.gz", "e.parquet"]
    for name, start, stop in zip(names, cuts, cuts[1:], strict=False):
        write(tmp_path / "rows" / name, rows[start:stop])
    return str(tmp_path / "rows")


def stream(path, make, kind="demonstrations", *, place=Placement(), window_rows=40, batch_size=4, limit=None, **more):  # noqa: B008
    reading = make_reading(StreamSource(path).files(), kind, None, make, limit)
    settings = {"seed": 3, "num_workers": 0, "bucket_batches": 2, **more}
    return StreamLoader(
        reading, COLLATORS[kind](0), batch_size=batch_size, place=place, window_rows=window_rows, **settings
    )


def plain(batch):
    """Comparable."""
    fields = batch if isinstance(batch, tuple) else vars(batch).values()
    return [field.tolist() if isinstance(field, torch.Tensor) else field for field in fields]


def taken(loader):
    return [plain(batch) for batch in loader]


def texts(batches):
    """The rows of batches, without padding, in no order."""
    return sorted(
        tuple(token for token, real in zip(ids, mask, strict=True) if real)
        for batch in batches
        for ids, mask in zip(batch[0], batch[1], strict=True)
    )


def test_a_window_of_all_rows_gives_the_batches_of_a_loader_over_all_rows(folder, rows, word):
    table = tokenize_demonstrations(Dataset.from_list(rows), word)
    for place in (Placement(), Placement(1, 3, 2)):
        whole = make_loader(
            table,
            SequenceCollator(0),
            batch_size=4,
            shuffle=True,
            seed=3,
            place=place,
            num_workers=0,
            weights=numbers(table, "supervised"),
            bucket_batches=2,
        )
        streamed = stream(folder, partial(demonstrations, word), window_rows=ROWS, place=place)
        assert [taken(streamed) for _ in range(3)] == [taken(whole) for _ in range(3)]


def test_windows_shuffle_among_themselves_and_every_row_comes_once(folder, word, rows):
    loader = stream(folder, partial(demonstrations, word))
    first, second = taken(loader), taken(loader)
    assert first != second
    whole = tokenize_demonstrations(Dataset.from_list(rows), word)["input_ids"][:]
    for epoch in (first, second):
        assert texts(epoch) == sorted(map(tuple, whole))
        for window in range(5):
            assert texts(epoch[10 * window : 10 * (window + 1)]) == sorted(
                map(tuple, whole[40 * window : 40 * (window + 1)])
            )


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_nothing(folder, word, workers):
    alone = stream(folder, partial(demonstrations, word))
    helped = stream(folder, partial(demonstrations, word), num_workers=workers)
    assert [taken(helped) for _ in range(2)] == [taken(alone) for _ in range(2)]


@pytest.mark.parametrize("accumulate", [1, 2, 5])
@pytest.mark.parametrize("window_rows", [16, 40, 1000])
def test_the_rows_of_a_step_over_two_ranks_are_those_that_one_rank_gets(folder, word, accumulate, window_rows):
    make = partial(demonstrations, word)
    one = taken(stream(folder, make, batch_size=8, place=Placement(0, 1, accumulate), window_rows=window_rows))
    ranks = [
        taken(stream(folder, make, batch_size=4, place=Placement(rank, 2, accumulate), window_rows=window_rows))
        for rank in range(2)
    ]
    assert len(one) == len(ranks[0]) == len(ranks[1])
    for start in range(0, len(one), accumulate):
        step = slice(start, start + accumulate)
        both = [batch for rank in ranks for batch in rank[step]]
        assert texts(both) == texts(one[step])
        learnt = sum(flag for batch in both for mask in batch[2] for flag in mask)
        assert [batch[3] for batch in both] == pytest.approx([learnt / 2 / accumulate] * len(both))
        assert [batch[3] for batch in one[step]] == pytest.approx([learnt / accumulate] * len(one[step]))


def test_a_rest_too_small_for_all_ranks_joins_the_window_before(tmp_path, word, rows):
    path = write(tmp_path / "r.jsonl", rows[:81])  # two windows and a row
    make = partial(demonstrations, word)
    ranks = [taken(stream(path, make, place=Placement(rank, 2), window_rows=40)) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [10, 10]
    assert len(texts(ranks[0] + ranks[1])) == 81


def test_windows_are_shuffled_each_in_its_own_way(tmp_path, word, rows):
    batches = taken(stream(write(tmp_path / "r.jsonl", rows[:40] * 2), partial(demonstrations, word), bucket_batches=1))
    assert texts(batches[:10]) == texts(batches[10:])
    assert batches[:10] != batches[10:]


@pytest.mark.parametrize("place", [Placement(), Placement(1, 2, 2)])
def test_an_iteration_begins_at_any_batch_of_any_epoch(folder, word, place):
    make = partial(demonstrations, word)
    loader = stream(folder, make, place=place)
    epochs = [taken(loader) for _ in range(3)]
    for epoch, position in [
        (0, 0),
        (0, 1),
        (0, len(epochs[0])),
        *((2, number) for number in range(len(epochs[2]) + 1)),
    ]:
        again = stream(folder, make, place=place)
        again.where = lambda at=(epoch, position): at
        assert taken(again) == epochs[epoch][position:]
        again.where = None
        assert taken(again)[:2] == (epochs[epoch + 1][:2] if epoch < 2 else taken(loader)[:2])
        loader.epoch = 3


def test_from_a_known_window_nothing_before_it_is_tokenized(folder, word, monkeypatch):
    make = partial(demonstrations, word)
    loader = stream(folder, make)
    epoch = taken(loader)
    iterator = iter(loader)
    list(islice(iterator, 33))
    known = loader.known_at(1, 33)
    assert known == Known(1, 3, 120, 40)
    assert loader.known_at(0, 33) == Known(0, 0, 0, 40)
    second = taken(iterator)
    encoded = []
    real = chunks.ChunkEncoder.__call__
    monkeypatch.setattr(
        chunks.ChunkEncoder, "__call__", lambda self, rows: encoded.extend(n for n, *_ in rows) or real(self, rows)
    )
    resumed = stream(folder, make)
    resumed.known, resumed.where = known, lambda: (1, 33)
    assert taken(resumed) == second
    assert encoded == list(range(120, ROWS))
    resumed.where = lambda: (0, 0)
    assert taken(resumed) == epoch  # what is known of another epoch is of no use


def test_skipped_lines_are_not_parsed(tmp_path, rows, word, monkeypatch):
    path = write(tmp_path / "r.jsonl", rows)
    loader = stream(path, partial(demonstrations, word))
    loader.known, loader.where = Known(0, 4, 160, 40), lambda: (0, 40)
    expected = taken(stream(path, partial(demonstrations, word)))[40:]
    parsed = []
    decoder = "rlhf_lightning.data.json_files.DECODER"
    monkeypatch.setattr(decoder, SimpleNamespace(decode=lambda line: parsed.append(line) or json.loads(line)))
    assert taken(loader) == expected
    assert parsed == [json.dumps(row) for row in rows[160:]]


def test_rows_that_are_left_out_leave_no_hole(tmp_path, word, caplog):
    generator = random.Random(1)
    rows = [{"prompt": said(generator), "chosen": "a", "rejected": "b " * generator.randint(1, 9)} for _ in range(150)]
    rows += [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 7
    path = write(tmp_path / "r.jsonl", rows)
    loader = stream(path, partial(preferences, word, 12), "preferences")
    first = taken(loader)
    kept = [
        r for r in rows if len((r["prompt"] + " " + r["rejected"]).split()) + 2 <= 12 and r["chosen"] != r["rejected"]
    ]
    assert 60 < len(kept) < 110
    assert [len(batch[0]) // 2 for batch in first] == [4] * (len(kept) // 4) + [len(kept) % 4] * (len(kept) % 4 > 0)
    assert f"{150 - len(kept)} rows of the stream are left out: pairs longer than 12 tokens" in caplog.text
    assert "7 rows of the stream are left out: the same text as chosen and rejected" in caplog.text
    again = stream(path, partial(preferences, word, 12), "preferences", num_workers=2)
    again.where = lambda: (0, 13)
    assert taken(again) == first[13:]
    with pytest.raises(UserError, match="no row of the stream is left: all are left out: pairs longer than 2 tokens"):
        taken(stream(path, partial(preferences, word, 2), "preferences"))


def test_prompts_bring_the_columns_of_the_first_row(tmp_path, word):
    rows = [{"prompt": "a b", "answer": "x", "n": 1}, {"prompt": "c", "n": 2}]
    (batch,) = stream(write(tmp_path / "r.jsonl", rows), partial(prompts, word), "prompts")
    assert sorted(zip(batch.prompts, batch.columns["answer"], batch.columns["n"], strict=True)) == [
        ("a b", "x", 1),
        ("c", None, 2),
    ]
    write(tmp_path / "r.jsonl", [*rows, {"prompt": "d", "label": 3}])
    with pytest.raises(UserError, match=r"r.jsonl, row 3: the first row has no column 'label'"):
        taken(stream(str(tmp_path / "r.jsonl"), partial(prompts, word), "prompts"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a", "completion": }', r"b.jsonl, line 31, character \d+: not JSON"),
        ('{"prompt": "a"}', r"b.jsonl, row 31 \(read as prompt-completion\): column 'completion' is missing"),
        (
            '{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}',
            r"b.jsonl, row 31 .*gives 'prompt' as messages",
        ),
        ("[]", r"b.jsonl, line 31: a row must be an object"),
    ],
)
def test_bad_rows_are_named_by_file_and_row(tmp_path, word, rows, row, message, workers):
    write(tmp_path / "a.jsonl", rows[:50])
    good = [json.dumps(row) for row in rows[:60]]
    (tmp_path / "b.jsonl").write_text("\n".join([*good[:30], row, *good[30:]]))
    with pytest.raises(UserError, match=message) as error:
        taken(stream(str(tmp_path), partial(demonstrations, word), num_workers=workers))
    assert len(str(error.value).splitlines()) == 1


def test_a_long_prompt_is_refused_by_file_and_row(tmp_path, word):
    path = write(tmp_path / "r.jsonl", [{"prompt": "a"}, {"prompt": "a b c"}])
    with pytest.raises(
        UserError, match=r"r.jsonl, row 2: the prompt has 4 tokens and the limit is 3; raise max_prompt"
    ):
        taken(stream(path, partial(prompts, word, 3), "prompts"))
    assert texts(taken(stream(path, partial(prompts, word, 3, "drop"), "prompts"))) == [(1, 6)]


def test_the_limit_counts_rows_over_all_files(folder, word, rows):
    made = texts(taken(stream(folder, partial(demonstrations, word), limit=70, num_workers=2)))
    assert made == sorted(map(tuple, tokenize_demonstrations(Dataset.from_list(rows[:70]), word)["input_ids"][:]))


def test_files_are_named_by_path_folder_pattern_or_list(tmp_path, folder, rows):
    names = ["a.jsonl", "b.parquet", "c.json", "d.jsonl.gz", "e.parquet"]
    assert [file.name for file in StreamSource(folder).files()] == names
    assert [file.name for file in StreamSource(f"{folder}/*.parquet").files()] == ["b.parquet", "e.parquet"]
    listed = StreamSource([f"{folder}/e.parquet", f"{folder}/a*"])
    assert [file.name for file in listed.files()] == ["e.parquet", "a.jsonl"]
    (tmp_path / "t.csv").write_text("text\na\n")
    (tmp_path / "e.jsonl").write_text("")
    for path, message in {
        "nothing/*.jsonl": "no file to stream",
        "t.csv": "can't be streamed",
        "e.jsonl": "is empty",
    }.items():
        with pytest.raises(UserError, match=message):
            StreamSource(str(tmp_path / path)).files()
    with pytest.raises(UserError, match="window_rows is 0"):
        StreamSource(folder, window_rows=0)


def trainer(**fields):
    usual = {
        "fast_dev_run": False,
        "max_steps": 9,
        "max_epochs": -1,
        "limit_train_batches": 1.0,
        "val_check_interval": 1.0,
        "callbacks": [],
        "lightning_module": SimpleNamespace(),
    }
    return SimpleNamespace(**{**usual, **fields})


def test_a_run_over_a_stream_must_know_its_end():
    check_stream(trainer())
    check_stream(trainer(val_check_interval=5))
    check_stream(trainer(fast_dev_run=True, max_epochs=1, limit_train_batches=1))
    check_stream(trainer(max_steps=-1, callbacks=[Timer(duration={"hours": 1})]))
    check_stream(trainer(max_steps=-1, lightning_module=SimpleNamespace(iterations=5)))
    cases = {
        "set trainer.max_steps": {"max_steps": -1, "lightning_module": SimpleNamespace(iterations=None)},
        "leave trainer.max_epochs out": {"max_epochs": 2},
        "leave limit_train_batches out": {"limit_train_batches": 6},
        "val_check_interval in batches": {"val_check_interval": 0.5},
    }
    for message, fields in cases.items():
        with pytest.raises(UserError, match=message):
            check_stream(trainer(**fields))


def test_modules_stream_and_hold_nothing_out(tmp_path, folder, rows, word):
    word.save_pretrained(tmp_path / "word")
    held_out = write(tmp_path / "held.jsonl", rows[:7])
    data = DemonstrationDataModule(
        StreamSource(folder, validation_path=held_out), str(tmp_path / "word"), batch_size=8, num_workers=1
    )
    data.setup("fit")
    assert len(data.rows["validation"]) == 7
    assert "train" not in data.rows
    assert sum(len(batch.input_ids) for batch in data.train_dataloader()) == ROWS
    assert sum(len(batch.input_ids) for batch in data.val_dataloader()) == 7
    assert data.fingerprint()["rows"] == 5
    with pytest.raises(UserError, match=r"no rows can be held out; give source.validation_path"):
        DemonstrationDataModule(StreamSource(folder), str(tmp_path / "word")).setup("fit")
    asked = PromptDataModule(StreamSource(folder), str(tmp_path / "word"), split=Split(0.0), batch_size=5)
    asked.setup("fit")
    assert sorted(n for batch in asked.train_dataloader() for n in batch.columns["id"]) == list(range(ROWS))
    assert (
        not list((tmp_path / "cache").glob("*/data-*")) or len(list((tmp_path / "cache").iterdir())) == 1
    )  # held.jsonl
