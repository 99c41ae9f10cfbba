"""A dataset that changes: a resumed run says so aloud, and a changed file is never answered from a cache."""

import csv
import gzip
import json
import os

import pytest

from rlhf_lightning.cli import main
from rlhf_lightning.data.sources import FileSource

FIT = [
    "fit",
    "--model",
    "SFTModule",
    "--data",
    "DemonstrationDataModule",
    "--data.split.validation=0",
    "--data.batch_size",
    "4",
]
FIT += ["--trainer.accelerator", "cpu", "--wandb", "disabled", "--samples.every_n_steps", "0"]
FIT += ["--trainer.enable_progress_bar", "false"]


def write(path, answers):
    path.write_text("".join(json.dumps({"prompt": "who owns the kite ?", "completion": a}) + "\n" for a in answers))


def fit(base, folder, file, epochs, *more):
    args = [
        "--model.policy.path",
        str(base / "policy"),
        "--data.source",
        str(file),
        "--trainer.max_epochs",
        str(epochs),
    ]
    main([*FIT, *args, "--trainer.default_root_dir", str(folder / "run"), *more])


def changed(caplog):
    return [record.message for record in caplog.records if "changed since" in record.message]


EIGHT = ["anna", "ben", "clara", "dan", "emma", "finn", "the dog", "the cat"]


@pytest.mark.parametrize(
    ("later", "counts"),
    [
        (EIGHT[:5], "8 rows then, 5 now"),
        (["ben", *EIGHT[1:]], "8 rows then, 8 now"),
        (EIGHT[::-1], "8 rows then, 8 now"),
    ],
    ids=["fewer", "one other", "another order"],
)
def test_a_resume_on_other_rows_says_so(base, tmp_path, caplog, later, counts):
    file = tmp_path / "rows.jsonl"
    write(file, EIGHT)
    fit(base, tmp_path, file, 1)
    assert changed(caplog) == []
    write(file, later)
    fit(base, tmp_path, file, 2, "--ckpt_path", "last")
    (said,) = changed(caplog)
    assert str(file) in said
    assert counts in said


def test_a_resume_on_the_same_rows_says_nothing(base, tmp_path, caplog):
    file, moved = tmp_path / "rows.jsonl", tmp_path / "moved.jsonl"
    write(file, EIGHT)
    fit(base, tmp_path, file, 1)
    file.rename(moved)  # another name, the same rows
    fit(base, tmp_path, moved, 2, "--ckpt_path", "last")
    assert changed(caplog) == []


def test_validating_a_checkpoint_on_other_rows_is_nothing_to_warn_of(base, tmp_path, caplog):
    write(tmp_path / "a.jsonl", EIGHT)
    write(tmp_path / "b.jsonl", EIGHT[:4])
    fit(base, tmp_path, tmp_path / "a.jsonl", 1)
    args = ["validate", *FIT[1:], "--model.policy.path", str(base / "policy"), "--data.source", "FileSource"]
    args += [f"--data.source.{key}={tmp_path / 'b.jsonl'}" for key in ("path", "validation_path")]
    main([*args, "--trainer.default_root_dir", str(tmp_path / "run"), "--ckpt_path", "last"])
    assert changed(caplog) == []


def as_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def as_json(path, texts):
    path.write_text(json.dumps([{"text": text} for text in texts]))


def as_gz(path, texts):
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode(), mtime=0))


def as_csv(path, texts):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])


def as_text(path, texts):
    path.write_text("<|endoftext|>".join(texts))


def as_parquet(path, texts):
    from datasets import Dataset

    Dataset.from_dict({"text": texts}).to_parquet(path)


WRITERS = {
    "rows.jsonl": as_jsonl, "rows.json": as_json, "rows.jsonl.gz": as_gz, "rows.csv": as_csv, "rows.txt": as_text,
    "rows.parquet": as_parquet,
}  # fmt: skip


@pytest.mark.parametrize("inside", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_rewritten_file_is_read_anew_even_at_the_same_time_and_size(tmp_path, name, inside):
    """As rsync -t, cp -p, a git checkout or a coarse clock leave it: same path, length and modification time."""
    folder = tmp_path / "data"
    folder.mkdir()
    file, place = folder / name, folder if inside else folder / name
    for texts in (["one", "two"], ["ten", "six"]):
        WRITERS[name](file, texts)
        os.utime(file, ns=(10**18, 10**18))
        assert list(FileSource(str(place)).load("demonstrations")["train"]["text"]) == texts
