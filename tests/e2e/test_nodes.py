"""Two hosts under torchrun or Slurm give what two ranks on one host give; one of them may go at any time, and is missed."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.nodes import Hosts, TwoNodes
from tests.resume.runs import Crew, arguments, differences, free_port

pytestmark = pytest.mark.slow
MINUTE = 60.0
SCRIPT = Path(__file__).parents[2] / "configs" / "launch" / "slurm.sbatch"
DDP = ("--trainer.strategy", "ddp")


@pytest.fixture(scope="module")
def crew(tmp_path_factory):
    return Crew(tmp_path_factory.mktemp("nodes"))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    hosts = Hosts(tmp_path_factory.mktemp("hosts"))
    print("two network namespaces" if hosts.apart else "no network namespaces here: two agents on loopback")
    yield hosts
    hosts.close()


@pytest.fixture
def begin(hosts, crew):
    runs = []

    def begun(name, *more, method="ppo", backend="static"):
        folder = crew.folder / name
        runs.append(TwoNodes(hosts, arguments(method, crew.base, folder, *DDP, *more), folder, backend))
        return runs[-1], folder

    yield begun
    for run in runs:
        run.close()


@pytest.fixture(scope="module")
def on_one_host(crew):
    return crew.finish("ppo", "one-host", ranks=2)


def test_two_hosts_are_two_ranks_and_one_that_is_killed_is_missed_and_the_run_goes_on(begin, on_one_host):
    run, folder = begin("killed")
    run.wait_for(folder / "checkpoints" / "last.ckpt")
    run.kill(1)
    killed = time.monotonic()
    assert run.join(MINUTE, of=(0,)) != [0], run.text(0)
    print(f"the other host knew after {time.monotonic() - killed:.1f} s")
    assert "error: a rank that this one waits for is gone (Connection" in run.text(0)
    assert not (folder / "export").exists()
    run.close()
    run, _ = begin("killed", "--ckpt_path", "last")
    assert run.join(2 * MINUTE) == [0, 0], run.text()
    assert differences(on_one_host, folder) == []


@pytest.mark.parametrize("limit", ["12", pytest.param("40", marks=pytest.mark.exhaustive)])
def test_a_cable_that_is_pulled_is_missed_on_both_sides(begin, hosts, limit):
    """Neither end is told: without the heartbeat both would wait for half an hour."""
    if not hosts.apart:
        pytest.skip("no network namespaces here: there is no cable")
    run, folder = begin(f"pulled-{limit}", "--heartbeat.limit", limit, "--trainer.max_epochs", "1000")
    run.wait_for(folder / "checkpoints" / "last.ckpt")
    hosts.pull_cable()
    pulled = time.monotonic()
    try:
        codes = run.join(MINUTE)
    finally:
        hosts.plug_in()
    print(f"both hosts knew after {time.monotonic() - pulled:.1f} s")
    assert 0 not in codes
    assert "error: rank 1 on host" in run.text(0)
    assert "error: rank 0 on host" in run.text(1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", ["static", "c10d"])
def test_two_hosts_are_one_process(begin, crew, backend):
    one = crew.finish("sft", f"one-{backend}", "--data.batch_size", "8")
    run, two = begin(f"two-{backend}", method="sft", backend=backend)
    assert run.join(2 * MINUTE) == [0, 0], run.text()
    rows, others = (list(csv.DictReader((folder / "metrics.csv").open())) for folder in (one, two))
    assert len(rows) == len(others) > 3
    for row, other in zip(rows, others, strict=True):
        expected = {name: float(value) for name, value in row.items() if value}
        assert {name: float(other[name]) for name in expected} == pytest.approx(expected, rel=2e-5)


@pytest.mark.exhaustive
def test_a_slurm_job_that_is_to_end_queues_again_and_goes_on(crew, on_one_host, tmp_path):
    """With an srun and an scontrol of our own; the script, its signals and Lightning's reading of Slurm are what they are."""
    folder, queue = crew.folder / "slurm", tmp_path / "queue"
    shutil.copy(Path(__file__).with_name("srun"), tmp_path / "srun")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {queue}\n')
    (tmp_path / "scontrol").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {"JOB_ID": "12345", "JOB_NAME": "rlhf", "NTASKS": "2", "NTASKS_PER_NODE": "1", "NNODES": "2"}
    environment = os.environ | {f"SLURM_{name}": value for name, value in slurm.items()}
    environment |= {"PATH": path, "SLURM_NODELIST": "127.0.0.1", "RLHF_LIGHTNING_CACHE": str(crew.cache)}
    args = arguments("ppo", crew.base, folder, *DDP)[1:]
    codes = []
    with (tmp_path / "log").open("w") as log:
        for number in range(2):
            environment["MASTER_PORT"] = str(free_port())
            job = subprocess.Popen(["bash", str(SCRIPT), *args], env=environment, stdout=log, stderr=log)
            while number == 0 and not (folder / "checkpoints" / "last.ckpt").exists():
                assert job.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.005)
            if number == 0:
                job.send_signal(signal.SIGTERM)
            codes.append(job.wait(2 * MINUTE))
    assert codes == [0, 0], (tmp_path / "log").read_text()[-3000:]
    assert queue.read_text() == "requeue 12345\n"
    assert differences(on_one_host, folder) == []
