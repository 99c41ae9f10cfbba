"""Files of checkpoints: whole or not there, checked before use, and an error of one line where that fails."""

import csv
import errno
import os
import resource
import time
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from rlhf_lightning.callbacks import checkpoint_file
from rlhf_lightning.callbacks.checkpoint_file import WholeFiles, check_sound, fault_of, read, remove_leftovers
from rlhf_lightning.callbacks.metrics_file import RunMetrics
from rlhf_lightning.callbacks.random_state import random_state, set_random_state
from rlhf_lightning.commands.run_folder import RunFolder
from rlhf_lightning.errors import UserError
from rlhf_lightning.modules.metrics import Means


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def content(number, size=1000):
    return {"state_dict": {"weight": torch.full((size,), float(number))}, "run": {}}


def module(size=1000, kind=nn.Module):
    made = kind()
    made.register_buffer("weight", torch.zeros(size))
    return made


@pytest.fixture
def io():
    return WholeFiles(module())


def number(path):
    return float(read(path)["state_dict"]["weight"][0])


def test_last_is_replaced_and_what_it_was_is_kept(io, tmp_path):
    for step in (1, 2, 3):
        io.save_checkpoint(content(step), tmp_path / "last.ckpt")
    assert files(tmp_path) == ["last.ckpt", "previous.ckpt"]
    assert (number(tmp_path / "last.ckpt"), number(tmp_path / "previous.ckpt")) == (3, 2)


def test_the_previous_one_is_a_file_of_its_own_where_there_are_no_hard_links(io, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        io.save_checkpoint(content(step), tmp_path / "last.ckpt")
    assert (number(tmp_path / "last.ckpt"), number(tmp_path / "previous.ckpt")) == (2, 1)


@contextmanager
def files_no_longer_than(size):
    """The kernel refuses to write more, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [0, 5000, 900_000])
def test_a_full_disk_leaves_what_was_there_and_says_how_to_go_on(io, tmp_path, limit):
    io.save_checkpoint(content(1), tmp_path / "last.ckpt")
    before = (tmp_path / "last.ckpt").read_bytes()
    with files_no_longer_than(limit), pytest.raises(UserError) as raised:
        io.save_checkpoint(content(2, size=1_000_000), tmp_path / "last.ckpt")
    message = str(raised.value)
    assert str(tmp_path / "last.ckpt") in message
    assert "--ckpt_path last" in message
    assert "\n" not in message
    assert files(tmp_path) == ["last.ckpt"]
    assert (tmp_path / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_leaves_what_was_there(io, tmp_path, monkeypatch, call):
    io.save_checkpoint(content(1), tmp_path / "last.ckpt")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match="No space left on device"):
        io.save_checkpoint(content(2), tmp_path / "last.ckpt")
    monkeypatch.undo()
    assert number(tmp_path / "last.ckpt") == 1
    assert [name for name in files(tmp_path) if "last" in name] == ["last.ckpt"]


def test_with_no_checkpoint_yet_a_full_disk_asks_to_begin_again(io, tmp_path):
    with files_no_longer_than(0), pytest.raises(UserError, match="--overwrite true"):
        io.save_checkpoint(content(1), tmp_path / "last.ckpt")
    assert files(tmp_path) == []


def test_what_is_no_fault_of_the_disk_is_not_blamed_on_it(io, tmp_path):
    class Unpicklable:
        def __reduce__(self):
            raise RuntimeError("a lock can't be pickled")

    with pytest.raises(RuntimeError, match="a lock"):
        io.save_checkpoint({"state_dict": Unpicklable()}, tmp_path / "last.ckpt")
    assert files(tmp_path) == []


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit_of_a_weight(path):
    data = bytearray(path.read_bytes())
    at = data.index(torch.full((4,), 3.0).numpy().tobytes()) + 5
    data[at] ^= 1
    path.write_bytes(bytes(data))


def other_text(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize("damage", [cut, halve, empty, flip_a_bit_of_a_weight, other_text])
def test_a_damaged_checkpoint_is_named_and_the_newest_sound_one_offered(io, tmp_path, damage):
    for step, name in enumerate(["old.ckpt", "newer.ckpt", "newest.ckpt", "last.ckpt"]):
        io.save_checkpoint(content(step), tmp_path / name)
        os.utime(tmp_path / name, (time.time() + step, time.time() + step))
    damage(tmp_path / "last.ckpt")
    halve(tmp_path / "newest.ckpt")
    os.utime(tmp_path / "newest.ckpt", (time.time() + 9, time.time() + 9))  # newer, but no use
    with pytest.raises(UserError) as raised:
        check_sound(tmp_path / "last.ckpt")
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'last.ckpt'} is damaged")
    assert message.endswith(f"--ckpt_path {tmp_path / 'newer.ckpt'}")
    assert "\n" not in message


def test_where_nothing_is_sound_it_says_so(io, tmp_path):
    io.save_checkpoint(content(1), tmp_path / "last.ckpt")
    io.save_checkpoint(content(2), tmp_path / "last.ckpt")
    for path in tmp_path.iterdir():
        cut(path)
    with pytest.raises(UserError, match="no other checkpoint"):
        read(tmp_path / "last.ckpt")


def test_torch_itself_does_not_notice_a_flipped_bit(io, tmp_path):
    """Why the checksums are looked at."""
    io.save_checkpoint(content(3), tmp_path / "last.ckpt")
    flip_a_bit_of_a_weight(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert "checksum" in fault_of(tmp_path / "last.ckpt")


def test_a_checkpoint_of_another_size_or_class_is_an_error(io, tmp_path):
    saved = content(1, size=999)
    io.save_checkpoint(saved, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"another model: weight is \(999,\) there and \(1000,\) here"):
        io.load_checkpoint(tmp_path / "last.ckpt")
    io.save_checkpoint(content(1) | {"run": {"module": "rlhf_lightning.modules.sft.SFTModule"}}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"is of a rlhf_lightning.modules.sft.SFTModule, not of a torch.nn"):
        io.load_checkpoint(tmp_path / "last.ckpt")


def test_leftovers_are_deleted_and_nothing_else(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "export").mkdir()
    (run / ".export.x1").mkdir()
    for name in (
        ".metrics.csv.tmp",
        "checkpoints/.last.ckpt.tmp",
        "metrics.csv",
        "checkpoints/last.ckpt",
        ".env",
        "a.tmp",
    ):
        (run / name).write_text("")
    RunFolder(run).clear_up()
    found = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
    assert found == [".env", "a.tmp", "checkpoints", "checkpoints/last.ckpt", "export", "metrics.csv"]


def test_there_may_be_no_folder_yet(tmp_path):
    remove_leftovers(tmp_path / "none")


def test_scratch_files_are_no_checkpoints_to_anyone(tmp_path):
    assert checkpoint_file.scratch_of(tmp_path / "last.ckpt").suffix != ".ckpt"


# ---------------------------------------------------------------- metrics.csv


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_in_the_file_at_once_under_sorted_columns(tmp_path):
    logger = RunMetrics(str(tmp_path))
    logger.log_metrics({"b": 1.5}, step=0)
    logger.log_metrics({"a": 2.0}, step=1)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["a,b,step", ",1.5,0", "2.0,,1"]


def test_going_on_drops_what_the_checkpoint_had_not_seen(tmp_path):
    logger = RunMetrics(str(tmp_path))
    for step in range(3):
        logger.log_metrics({"loss": step / 10}, step=step)
    seen = logger.sync()
    whole = (tmp_path / "metrics.csv").read_text()
    logger.log_metrics({"loss": 9.0, "late": 1.0}, step=3)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("1.0,0.12")  # torn
    again = RunMetrics(str(tmp_path))
    again.cut(seen)
    assert [row["loss"] for row in table(tmp_path / "metrics.csv")] == ["0.0", "0.1", "0.2"]
    again.log_metrics({"loss": 0.3}, step=3)
    assert [row["step"] for row in table(tmp_path / "metrics.csv")] == ["0", "1", "2", "3"]
    assert whole.splitlines()[1] == "0.0,0"


def test_a_full_disk_ends_the_run_with_one_line_and_leaves_the_rows(tmp_path):
    logger = RunMetrics(str(tmp_path))
    logger.log_metrics({"loss": 1.0}, step=0)
    before = (tmp_path / "metrics.csv").read_text()
    with (
        files_no_longer_than(len(before)),
        pytest.raises(UserError, match=r"metrics.csv could not be written: .*--ckpt_path"),
    ):
        logger.log_metrics({"loss": 2.0}, step=1)
    assert (tmp_path / "metrics.csv").read_text() == before


def test_a_folder_without_the_file_begins_one(tmp_path):
    logger = RunMetrics(str(tmp_path / "new"))
    logger.cut(7)
    assert logger.sync() == 0
    logger.log_metrics({"loss": 1.0}, step=8)
    assert len(table(tmp_path / "new" / "metrics.csv")) == 1


# ---------------------------------------------------------------- what was counted since the last log


def counted(loss, tokens):
    return {"loss": (torch.tensor(float(loss)), 2), "tokens": (torch.tensor(float(tokens)), 1)}


def test_means_go_on_in_another_process_and_totals_beyond_what_float32_counts():
    one, other = Means(["loss"], totals=["tokens"]), Means(["loss"], totals=["tokens"])
    one.update(counted(3, 2**24))
    assert one.drain() == {"loss": 1.5, "tokens": 2**24}
    one.update(counted(5, 1))
    state = one.own_state()
    one.update(counted(100, 100))  # the checkpoint has not seen this
    other.load_own_state(state)
    other.update(counted(7, 2))
    assert other.drain() == {"loss": 3.0, "tokens": 2**24 + 3}


# ---------------------------------------------------------------- random numbers


def draws():
    import random

    import numpy as np

    return (
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        torch.rand(3).tolist(),
    )


def test_every_generator_goes_on_where_it_was(tmp_path):
    draws()  # leaves a spare Gaussian number in Python's and in NumPy's
    torch.save(random_state(torch.device("cpu")), tmp_path / "state.pt")
    expected = [draws() for _ in range(3)]
    torch.manual_seed(5)
    draws()
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True), torch.device("cpu"))
    assert [draws() for _ in range(3)] == expected
