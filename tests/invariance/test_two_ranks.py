"""Two processes under DDP or FSDP2 over gloo log, differentiate and end as one with the rows of both.

Would have caught: advantages whitened on each rank alone (trl's PPO), normalisers of one rank (trl#2617, verl#906), metrics
that are rank 0's alone, a coefficient of the KL that differs between ranks, and ranks that wait for each other for ever
because one has a batch more (uneven rows over ranks).
"""

import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch

from rlhf_lightning.functional.advantages import whiten
from rlhf_lightning.functional.ranking import expected_calibration_error
from rlhf_lightning.functional.value import explained_variance
from rlhf_lightning.rollouts.buffer import parts
from tests.invariance.compare import assert_same
from tests.invariance.on_ranks import SHARED
from tests.invariance.rearrangements import PLAIN
from tests.invariance.subjects import ARCHITECTURES, SUBJECTS, Trace, run, scalar_folder
from tests.methods import methods_for

ROOT = Path(__file__).parents[2]


def on_two_ranks(folder: Path, strategy: str, subjects: list[str]) -> list[dict[str, dict[tuple[str, str], Trace]]]:
    """The traces of each rank, by subject, then by architecture and layout: one start for all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tests.invariance.on_ranks", str(folder), strategy, *subjects]
    threads = {"OMP_NUM_THREADS": "1", "NODE_RANK": "0"}
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | address | threads | {"LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=500)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()  # the one that waits for a rank that is gone; a SIGTERM it would take as a wish to stop
    assert [process.returncode for process in ranks] == [0, 0], errors
    return [torch.load(folder / f"{strategy}-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def scalars(tmp_path_factory):
    """Scalar models by architecture, in one folder."""
    folder = tmp_path_factory.mktemp("scalars")
    return {architecture: scalar_folder(folder, architecture) for architecture in ARCHITECTURES}


@pytest.fixture(scope="module")
def shared(request, scalars):
    """Gives the traces of both ranks; all subjects that this session asks about run in one pair of processes a strategy."""
    items = [item for item in request.session.items if item.path == request.path]
    subjects = sorted({item.callspec.params["subject"] for item in items if "subject" in item.fixturenames})
    folder = Path(scalars["rotary"]).parent

    @cache
    def traces(strategy):
        return on_two_ranks(folder, strategy, subjects)

    return lambda subject, strategy: [rank[subject] for rank in traces(strategy)]


def same_as_one(traces, subject, scalars):
    first, second = traces
    layouts = [layout for layout in SHARED if SUBJECTS[subject].takes(SHARED[layout])]
    assert first.keys() == second.keys() == {(a, layout) for a in ARCHITECTURES for layout in layouts}
    for (architecture, layout), got in first.items():
        other = second[architecture, layout].weights
        assert [name for name, value in got.weights.items() if not torch.equal(value, other[name])] == []
        assert_same(got, run(SUBJECTS[subject], architecture, scalars[architecture], PLAIN), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("subject", methods_for("two ranks"))
def test_two_ranks_do_as_one(subject, shared, scalars):
    same_as_one(shared(subject, "ddp"), subject, scalars)


@pytest.mark.slow
@pytest.mark.parametrize("subject", methods_for("two ranks"))
def test_two_ranks_with_half_of_the_weights_each_do_as_one(subject, shared, scalars):
    same_as_one(shared(subject, "fsdp2"), subject, scalars)


@pytest.mark.slow
@pytest.mark.parametrize("subject", methods_for("two ranks"))
def test_shards_change_nothing(subject, shared):
    copies, shards = (shared(subject, strategy)[0] for strategy in ("ddp", "fsdp2"))
    for where, got in shards.items():
        assert_same(got, copies[where], rtol=1e-9)


# ---------------------------------------------------------------- the same without processes, in a moment


def together(work):
    """``work(rank, all_sum)`` on two threads whose sums meet."""
    meet, sent = threading.Barrier(2, timeout=120), [torch.zeros(())] * 2

    def rank(number):
        def all_sum(value):
            sent[number] = value
            meet.wait()
            total = sent[0] + sent[1]
            meet.wait()
            return total

        return work(number, all_sum)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(rank, range(2)))


LENGTHS = torch.tensor([1, 6, 2, 5, 3])
MASK = torch.arange(6) < LENGTHS[:, None]
SHARES = slice(0, 4), slice(4, 5)  # rows of each rank


def drawn(seed):
    """The second rank's row is unlike the others."""
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)) + 5 * torch.tensor(
        [[0.0], [0], [0], [0], [1]]
    )


FORMULAS = {
    "whitened advantages": lambda rows, all_sum: whiten(drawn(0)[rows], MASK[rows], all_sum=all_sum),
    "whitened rewards": lambda rows, all_sum: whiten(drawn(0)[rows], MASK[rows], keep_mean=True, all_sum=all_sum),
    "explained variance": lambda rows, all_sum: explained_variance(
        drawn(1)[rows], drawn(2)[rows], MASK[rows], all_sum=all_sum
    ),
    "calibration error": lambda rows, all_sum: expected_calibration_error(drawn(3)[rows, 0] / 3, all_sum=all_sum),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_what_is_over_all_rows_is_over_those_of_both_ranks(name):
    formula = FORMULAS[name]
    whole = formula(slice(None), None)
    shared = together(lambda rank, all_sum: formula(SHARES[rank], all_sum))
    one_number = whole.dim() == 0
    torch.testing.assert_close(
        torch.stack(shared) if one_number else torch.cat(shared), whole.expand(2) if one_number else whole
    )
    assert not torch.allclose(formula(SHARES[0], None), whole[SHARES[0]] if whole.dim() else whole)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 2, 5, 7, 8])
def test_ranks_with_a_row_more_or_less_make_equally_many_batches(rows, size):
    """Else one waits for the other for ever: 65 responses on one rank and 64 on the next are two minibatches and one."""
    fewest = -(-rows // size)
    few, many = parts(torch.arange(rows), size, fewest), parts(torch.arange(rows + 1), size, fewest)
    assert len(few) == len(many) == fewest
    assert torch.cat(few).tolist() == list(range(rows))
    assert torch.cat(many).tolist() == list(range(rows + 1))
    assert [len(part) for part in few[:-1]] == [len(part) for part in many[:-1]] == [size] * (fewest - 1)
    assert max(map(len, many)) <= size + 1
