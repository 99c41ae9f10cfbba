"""A run goes on on another number of ranks: the same rows in every step, so the same figures but for rounding."""

import csv
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from rlhf_lightning.callbacks.other_ranks import Cut, check_same_rows, count_in_other_batches, own_of_other_ranks
from rlhf_lightning.callbacks.random_state import random_state
from rlhf_lightning.errors import UserError
from rlhf_lightning.modules.metrics import Means
from rlhf_lightning.modules.ranks import derived_seed
from tests.resume.runs import Signal

STRATEGY = "rlhf_lightning.modules.strategies.FSDP2Strategy"
DDP, FSDP2 = ("--trainer.strategy", "ddp"), ("--trainer.strategy", "fsdp2")
SHARDED = ("--trainer.strategy", json.dumps({"class_path": STRATEGY, "init_args": {"sharded_checkpoints": True}}))
# A step has 16 rows. The batches of the last way are half of the others', so there are twice as many.
TWO_RANKS = ("--data.batch_size", "4")
ONE_RANK = ("--data.batch_size", "8")
ONE_RANK_SMALL = (
    *("--data.batch_size", "4", "--trainer.accumulate_grad_batches", "4"),
    *("--trainer.val_check_interval", "8", "--checkpoint.every_n_batches", "10", "--samples.every_n_steps", "14"),
)
CHANGES = {
    "two to one": (2, (*DDP, *TWO_RANKS), 1, ONE_RANK),
    "two to one, smaller batches": (2, (*DDP, *TWO_RANKS), 1, ONE_RANK_SMALL),
    "one, smaller batches, to two": (1, ONE_RANK_SMALL, 2, (*FSDP2, *TWO_RANKS)),
    "shards to one": (2, (*SHARDED, *TWO_RANKS), 1, ONE_RANK),
    "shards to one shard": (2, (*SHARDED, *TWO_RANKS), 1, (*SHARDED, *ONE_RANK, "--trainer.devices", "1")),
    "one shard to two": (1, (*SHARDED, *ONE_RANK, "--trainer.devices", "1"), 2, (*SHARDED, *TWO_RANKS)),
    "one to shards": (1, ONE_RANK, 2, (*SHARDED, *TWO_RANKS)),
    "shards to whole": (2, (*SHARDED, *TWO_RANKS), 2, (*DDP, *TWO_RANKS)),
}
SOME = ("two to one, smaller batches", "one to shards")


def marked(change):
    return change if change in SOME else pytest.param(change, marks=pytest.mark.exhaustive)


def changed(crew, method, change, die=("batch", 12)):
    """A run that dies on some ranks in the midst of an epoch, two batches after a checkpoint, and goes on on others."""
    ranks, more, later_ranks, later = CHANGES[change]
    name = f"{method}-{change.replace(' ', '_').replace(',', '')}"
    small = ONE_RANK_SMALL[3] == "4" and more == ONE_RANK_SMALL  # twice as many batches
    run, folder = crew.run(method, name, *more, ranks=ranks, die=Signal(die[0], die[1] * (1 + small)))
    assert run.join()[0] == -9, run.log.read_text()[-3000:]
    run = crew.go_on(method, name, *later, ranks=later_ranks)
    assert run.join() == [0] * later_ranks, run.log.read_text()[-3000:]
    assert ("what is drawn at random" in run.log.read_text()) == (ranks != later_ranks)
    return folder


def rows_of(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def close(one, other):
    """The figures of two runs, and what they have learnt; Adam blows a rounding error up, so not to the last digit."""
    rows, others = rows_of(one), rows_of(other)
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    far = [
        (row["step"], name, row[name], again[name])
        for row, again in zip(rows, others, strict=True)
        for name in row
        if not math.isclose(row[name], again[name], rel_tol=1e-3, abs_tol=1e-4)
    ]
    assert far == []
    weights, again = (load_file(folder / "export" / "model.safetensors") for folder in (one, other))
    assert {
        name: float((weights[name] - again[name]).abs().max())
        for name in weights
        if not torch.allclose(weights[name], again[name], rtol=0, atol=1e-4)
    } == {}


@pytest.mark.slow
@pytest.mark.parametrize("change", [marked(change) for change in CHANGES])
def test_the_same_rows_and_figures(crew, whole, change):
    close(whole("sft", *DDP, *TWO_RANKS, ranks=2), changed(crew, "sft", change))


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["reward", "dpo"])
def test_every_offline_method_does(crew, whole, method):
    change = "shards to one"
    close(whole(method, *DDP, *TWO_RANKS, ranks=2), changed(crew, method, change))


@pytest.mark.slow
@pytest.mark.parametrize("change", ["two to one", pytest.param("one to shards", marks=pytest.mark.exhaustive)])
def test_ppo_goes_on_with_the_same_prompts(crew, whole, change):
    """What it samples is another matter; what it counts, and the prompts of each iteration, are not."""
    folder = changed(crew, "ppo", change, die=("batch", 8))
    rows, expected = rows_of(folder), rows_of(whole("ppo", *DDP, *TWO_RANKS, ranks=2))
    for name in ("train/iteration", "train/episode", "train/learning_rate"):
        assert [row[name] for row in rows if name in row] == [row[name] for row in expected if name in row], name


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_another_number_of_rows_a_step_is_an_error_that_states_both(crew, whole, ranks):
    last = str(whole("sft", *DDP, *TWO_RANKS, ranks=2) / "checkpoints" / "last.ckpt")
    size = "4" if ranks == 1 else "2"
    run = crew.run("sft", f"sft-other-rows-{ranks}", "--ckpt_path", last, "--data.batch_size", size, ranks=ranks)[0]
    assert run.join()[0] == 2
    (said,) = {line for line in run.log.read_text().splitlines() if line.startswith("error: ")}
    assert "16 rows a step (batch_size 4 x 2 ranks x accumulation 2)" in said
    assert f"this one has 8 rows a step (batch_size {size} x {ranks} ranks x accumulation 2)" in said


# ---------------------------------------------------------------- the parts, in a moment

THEN, NOW = Cut(batch_size=4, ranks=2, accumulate=3), Cut(batch_size=12, ranks=2, accumulate=1)


def test_batches_are_counted_anew():
    """Three epochs of four steps lie behind, the last of them short, and two steps of the next."""
    counters = dict.fromkeys(("ready", "started", "processed", "completed"), 42)
    loop = {"epoch_loop.batch_progress": {"total": counters, "current": dict.fromkeys(counters, 6)}}
    count_in_other_batches(loop, THEN, NOW)
    assert loop["epoch_loop.batch_progress"]["total"] == dict.fromkeys(counters, 14)
    assert loop["epoch_loop.batch_progress"]["current"] == dict.fromkeys(counters, 2)
    count_in_other_batches(loop, NOW, NOW)
    assert loop["epoch_loop.batch_progress"]["current"] == dict.fromkeys(counters, 2)


def test_only_the_product_matters():
    check_same_rows(THEN, NOW)
    with pytest.raises(UserError, match=r"24 rows a step .*, this one has 23 rows"):
        check_same_rows(THEN, Cut(batch_size=23, ranks=1, accumulate=1))


def counted(*losses):
    means = Means(["loss", "highest"], highest=["highest"], totals=["tokens"])
    for loss in losses:
        means.update({name: (torch.tensor(float(loss)), 2) for name in ("loss", "highest", "tokens")})
    return means


def states(*ranks):
    torch.manual_seed(3)
    return [{"random": random_state(torch.device("cpu")), "means": {"train": m.own_state()}} for m in ranks]


def test_what_two_ranks_had_counted_is_counted_on():
    saved = states(counted(1, 2), counted(5))
    one, more = own_of_other_ranks(saved, 0), own_of_other_ranks(saved, 2)
    first, other = counted(), counted()
    first.load_own_state(one["means"]["train"])
    other.load_own_state(more["means"]["train"])
    assert first.compute() == {"loss": 8 / 6, "highest": 5, "tokens": 8}
    assert other.compute() == {}
    assert other.peaks.max() == -torch.inf


def test_a_rank_that_was_not_there_draws_numbers_of_its_own_and_the_same_every_time():
    saved = states(counted(), counted())
    assert own_of_other_ranks(saved, 1)["random"] is saved[1]["random"]
    seeds = [own_of_other_ranks(saved, rank)["seed"] for rank in (2, 3, 2)]
    assert seeds[0] == seeds[2] != seeds[1]
    assert seeds[0] == derived_seed(saved[0]["random"]["torch"], 2)
    drawn = [torch.rand(3, generator=torch.Generator().manual_seed(seed)) for seed in seeds[:2]]
    assert not torch.equal(*drawn)
