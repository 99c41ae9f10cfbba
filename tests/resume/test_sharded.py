"""Checkpoints in shards: whole or not there, checked before use, the one before kept, and no more on the disk than needed."""

import json
import os
import pickle
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lightning.callbacks import checkpoint_file
from rlhf_lightning.callbacks.checkpoint_file import WholeFiles, check_sound, fault_of, read, remove_leftovers
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.shards import PlainUnpickler, checksum_of
from tests.gloo import on_ranks
from tests.resume.runs import Signal, differences

STRATEGY = {
    "class_path": "rlhf_lightning.modules.strategies.FSDP2Strategy",
    "init_args": {"sharded_checkpoints": True},
}
SHARDED = ("--trainer.strategy", json.dumps(STRATEGY))
CHAINS = {
    "folders": [("shards", 2), ("shards folder", 1), ("shards", 1), ("shards folder", 2), ("remove shards", 1)],
    "files": [("checkpoint", 1), ("checkpoint bytes", 2), ("previous", 1), ("checkpoint flush", 2)],
}

# ---------------------------------------------------------------- whole runs


def killed(crew, method, name, *deaths):
    first, *later = [Signal(*die) for die in deaths]
    run, folder = crew.run(method, name, *SHARDED, ranks=2, die=first)
    for die in [*later, None]:
        assert run.join()[0] == -signal.SIGKILL, run.log.read_text()[-3000:]
        run = crew.go_on(method, name, *SHARDED, ranks=2, die=die)
    assert run.join() == [0, 0], run.log.read_text()[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "deaths"),
    [
        ("ppo", [("update", 22)]),
        *[pytest.param("sft", deaths, marks=pytest.mark.exhaustive) for deaths in CHAINS.values()],
        *[
            pytest.param(method, [("batch", 8), ("validation", 1)], marks=pytest.mark.exhaustive)
            for method in ("reward", "dpo")
        ],
    ],
)
def test_a_killed_run_is_the_run_that_was_not(crew, whole, method, deaths):
    folder = killed(crew, method, f"{method}-sharded-{deaths[0][0].replace(' ', '_')}", *deaths)
    assert differences(whole(method, *SHARDED, ranks=2), folder) == []
    notes = [torch.load(path, weights_only=True)["shards"] for path in (folder / "checkpoints").glob("*.ckpt")]
    assert len(notes) == 2
    on_disk = [path.name for path in (folder / "checkpoints" / "shards").iterdir()]
    assert sorted(on_disk) == sorted(note["folder"] for note in notes)
    for note in notes:  # each rank has written, and about as much
        sizes = [size for name, (size, _) in note["files"].items() if name.endswith(".distcp")]
        assert len(sizes) == 2
        assert min(sizes) > 0.4 * sum(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", pytest.param("reward", marks=pytest.mark.exhaustive)])
def test_shards_are_what_one_file_would_hold_and_their_export_reloads(crew, whole, method):
    """In the small file there is no tensor of weights or of the optimizer left."""
    sharded, one = whole(method, *SHARDED, ranks=2), whole(method, "--trainer.strategy", "fsdp2", ranks=2)
    assert differences(one, sharded) == []
    last = sharded / "checkpoints" / "last.ckpt"
    assert last.stat().st_size < 0.5 * (one / "checkpoints" / "last.ckpt").stat().st_size
    kind = AutoModelForCausalLM if method == "ppo" else AutoModelForSequenceClassification
    network = kind.from_pretrained(sharded / "export")
    prefix = "actor_critic.policy.network." if method == "ppo" else "network.network."
    state_dict, exported = read(last)["state_dict"], network.state_dict()
    saved = {name.removeprefix(prefix): weight for name, weight in state_dict.items() if name.startswith(prefix)}
    assert saved.keys() == exported.keys()
    assert all(torch.equal(weight, exported[name]) for name, weight in saved.items())
    if method == "reward":
        assert network.config.reward_gain == pytest.approx(float(state_dict["network.gain"]))
        assert network.config.reward_gain != 1


@pytest.mark.slow
@pytest.mark.exhaustive
def test_damaged_shards_are_named_by_all_ranks_and_the_one_before_offered(crew, whole, tmp_path):
    folder = crew.folder / "sft-torn-shards"
    crew.finish("sft", folder.name, *SHARDED, ranks=2)
    last = folder / "checkpoints" / "last.ckpt"
    (torn,) = shards_of(last).glob("__1_*")
    flip(torn)
    run = crew.go_on("sft", folder.name, *SHARDED, ranks=2)
    assert run.join() == [2, 2]
    (said,) = {line for line in run.log.read_text().splitlines() if line.startswith("error: ")}
    assert said.startswith(f"error: {last} is damaged (the checksum of {torn} is wrong)")
    assert said.endswith(f"--ckpt_path {last.with_name('previous.ckpt')}")


# ---------------------------------------------------------------- the files, in a moment


class Network(nn.Module):
    """Two blocks, a tied weight, a buffer, and a weight with fewer rows than ranks."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 1)
        self.tied = nn.Linear(6, 5, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("gain", torch.tensor(1.0))


def network(number=0.0):
    torch.manual_seed(0)
    made = Network()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(number)
    return made


def in_shards(number=0.0):
    made, mesh = network(number), init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (made.second, made):  # a tie must not leave its group
        fully_shard(part, mesh=mesh)
    return made


def written(rank, folder, steps):
    """Checkpoints 1, 2, .. as last.ckpt, each with the state of an Adam that has gone a step."""
    for step in steps:
        made = in_shards(step)
        optimizer = torch.optim.AdamW(made.parameters())
        made.gain.fill_(step)
        for parameter in made.parameters():
            parameter.grad = torch.full_like(parameter, step)
        optimizer.step()
        checkpoint = {
            "state_dict": made.state_dict(),
            "optimizer_states": [optimizer.state_dict()],
            "loops": {"step": step},
            "run": {},
        }
        try:
            WholeFiles(made).save_checkpoint(checkpoint, Path(folder, "last.ckpt"))
        except UserError as error:
            return str(error)
    return None


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    on_ranks(written, folder / "ranks", str(folder / "run"), [1, 2])
    return folder / "run"


@pytest.fixture
def two(of_two_ranks, tmp_path):
    """A folder with two checkpoints that two ranks have written."""
    return Path(shutil.copytree(of_two_ranks, tmp_path / "run"))


def expected(step):
    made = network(step)
    optimizer = torch.optim.AdamW(made.parameters())
    made.gain.fill_(step)
    for parameter in made.parameters():
        parameter.grad = torch.full_like(parameter, step)
    optimizer.step()
    return made.state_dict(), optimizer.state_dict()


def shards_of(path):
    return path.parent / "shards" / torch.load(path, weights_only=True)["shards"]["folder"]


def test_one_process_reads_what_two_have_written(two):
    for name, step in (("last.ckpt", 2), ("previous.ckpt", 1)):
        checkpoint = read(two / name)
        weights, optimizer = expected(step)
        assert checkpoint["loops"] == {"step": step}
        assert "shards" not in checkpoint
        torch.testing.assert_close(checkpoint["state_dict"], dict(weights), rtol=0, atol=0)
        torch.testing.assert_close(checkpoint["optimizer_states"][0], optimizer, rtol=0, atol=0)


def test_a_tied_weight_is_written_once(two):
    index = torch.load(two / "last.ckpt", weights_only=True)["shards"]
    assert index["ties"] == {"tied.weight": "first.weight"}
    assert sorted(path.name for path in (two / "shards").iterdir()) == sorted(
        shards_of(two / name).name for name in ("last.ckpt", "previous.ckpt")
    )


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata"])
@pytest.mark.parametrize("damage", [flip, shorten, Path.unlink])
def test_damage_is_named_and_the_one_before_offered(two, damage, name):
    torn = shards_of(two / "last.ckpt") / name
    damage(torn)
    with pytest.raises(UserError) as raised:
        read(two / "last.ckpt")
    assert str(torn) in str(raised.value)
    assert str(raised.value).startswith(f"{two / 'last.ckpt'} is damaged")
    assert str(raised.value).endswith(f"--ckpt_path {two / 'previous.ckpt'}")
    if (
        damage is not flip or name == ".metadata"
    ):  # what can be seen without reading all of it, before anything is built
        with pytest.raises(UserError, match="is damaged"):
            check_sound(two / "last.ckpt", every_shard=False)


class Payload:
    """What a stranger's file might do."""

    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_an_index_that_holds_a_program_is_refused_and_not_run(two, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    index = shards_of(two / "last.ckpt") / ".metadata"
    index.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(pickle.UnpicklingError, match="system"), index.open("rb") as file:
        PlainUnpickler(file).load()
    checkpoint = torch.load(two / "last.ckpt", weights_only=True)
    checkpoint["shards"]["files"][".metadata"] = (index.stat().st_size, checksum_of(index))
    torch.save(checkpoint, two / "last.ckpt")
    assert fault_of(two / "last.ckpt") == f"{index.parent} holds more than tensors"
    assert not (tmp_path / "harmed").exists()


def full(rank, folder, limited, size):
    """The disk of one rank is full, as the kernel says it."""
    written(rank, folder, [1])
    if rank == limited:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    said = written(rank, folder, [2])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return said


@pytest.mark.parametrize(("limited", "size"), [(0, 0), (1, 0), (1, 2500)])
def test_a_full_disk_of_any_rank_leaves_what_was_there(tmp_path, limited, size):
    folder = tmp_path / "run"
    said = on_ranks(full, tmp_path / "ranks", str(folder), limited, size)
    assert said[0] == said[1]
    assert f"{folder / 'last.ckpt'} could not be written" in said[0]
    assert "--ckpt_path last" in said[0]
    assert read(folder / "last.ckpt")["loops"] == {"step": 1}
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "shards"]
    assert [path.name for path in (folder / "shards").iterdir()] == [shards_of(folder / "last.ckpt").name]


def test_leftovers_of_a_killed_run_are_deleted(two):
    torn = two / "shards" / ".last-0a1b2c3d.tmp"
    torn.mkdir()
    (torn / "__0_0.distcp").write_bytes(b"half")
    remove_leftovers(two)
    assert not torn.exists()
    assert fault_of(two / "last.ckpt") is fault_of(two / "previous.ckpt") is None


def test_no_shards_are_deleted_where_a_checkpoint_can_t_be_read(two):
    """It may be the one that speaks of them."""
    whole_run = two / "last.ckpt"
    shorten(whole_run)
    checkpoint_file.remove_unused(two)
    assert len(list((two / "shards").iterdir())) == 2
    whole_run.unlink()
    checkpoint_file.remove_unused(two)
    assert [path.name for path in (two / "shards").iterdir()] == [shards_of(two / "previous.ckpt").name]
