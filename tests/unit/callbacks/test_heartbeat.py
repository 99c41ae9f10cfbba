"""A rank that says nothing any more is missed; one that is slow, or through, is not."""

import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from rlhf_lightning.callbacks import heartbeat
from rlhf_lightning.callbacks.heartbeat import Heartbeat, lost_ranks
from rlhf_lightning.commands.run_folder import first_process
from rlhf_lightning.errors import UserError
from tests.gloo import on_ranks


def what_is_said(rank, ends):
    """Two ranks for eight seconds, at a limit of five; the second ends before in one of two ways, or computes on.

    A rank that is to be missed is waited for, however slow the machine is.
    """
    said = []

    def leave(what):
        said.append(what)
        raise SystemExit  # of the thread

    heartbeat.EVERY, heartbeat.leave = 0.1, leave
    callback = Heartbeat(limit=5.0)
    strategy = SimpleNamespace(barrier=lambda name: dist.barrier())
    trainer = SimpleNamespace(global_rank=rank, is_global_zero=rank == 0, world_size=2, strategy=strategy)
    callback.setup(trainer, None, "fit")
    if rank == 1 and ends == "with an error":
        callback.on_exception(trainer, None, RuntimeError())
    if rank == 1 and ends == "well":
        callback.teardown(trainer, None, "fit")
    end = time.monotonic() + (120 if ends == "with an error" else 8)
    while time.monotonic() < end and not said and not (rank == 1 and ends == "with an error"):
        time.sleep(0.1)
    dist.barrier()
    return said


@pytest.mark.parametrize(("ends", "missed"), [("with an error", True), ("well", False), ("not at all", False)])
def test_only_a_rank_that_is_gone_is_missed(tmp_path, ends, missed):
    first, second = on_ranks(what_is_said, tmp_path, ends)
    assert second == []
    assert bool(first) == missed
    assert not missed or first[0].startswith("rank 1 on host ")


def test_alone_there_is_nobody_to_miss():
    callback = Heartbeat()
    callback.setup(SimpleNamespace(world_size=1), None, "fit")
    assert callback._threads == []


def test_a_limit_that_a_late_beat_would_break_is_refused():
    with pytest.raises(UserError, match="at least 10"):
        Heartbeat(limit=6.0)


CLOSED = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.77.5.2]:41234"
REMOTE = "NCCL error: remote process exited or there was a network error"


@pytest.mark.parametrize("error", [RuntimeError(CLOSED), dist.DistBackendError(REMOTE)])
def test_a_closed_connection_is_a_rank_that_is_gone(error):
    with (
        pytest.raises(UserError, match=r"is gone \((Connection closed by peer \[10|remote process exited)"),
        lost_ranks(),
    ):
        raise error


@pytest.mark.parametrize("message", ["size mismatch", "Broken pipe", "gloo: Timed out"])
def test_any_other_error_stays_what_it_is(message):
    with pytest.raises(RuntimeError, match=f"^{message}$"), lost_ranks():
        raise RuntimeError(message)


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),  # Lightning starts these
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, True),
        ({"NODE_RANK": "1"}, False),
        ({"RANK": "8", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),  # torchrun
        ({"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, True),
        ({"SLURM_PROCID": "8", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}, False),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, True),
    ],
)
def test_one_process_of_all_hosts_looks_after_the_run_folder(monkeypatch, environment, first):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert first_process() == first
