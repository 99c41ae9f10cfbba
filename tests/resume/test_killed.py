"""A run that was killed and goes on is, bit for bit, the run that was not: every logged number, every weight, every state.

The kill is a real SIGKILL at a chosen place; `python -m tests.resume.kill` chooses the moments at random.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.resume.runs import BRIEF, FAST, METHODS, SAMPLING, Signal, arguments, differences

ROOT = Path(__file__).parents[2]
# Two epochs of twelve batches, two batches a step (ppo: one); checkpoints after batches 6, 10, 12, 16, 20, 24 (ppo: 5, 10, 12,
# 15, 20, 24), validations after 4, 8 and 12 of each epoch. Each number counts from where its process began.
CHAINS = {
    "batches": [("batch", 2), ("batch", 8), ("batch", 7), ("batch", 2), ("batch", 11)],
    "validations": [("validation", 3), ("after validation", 3), ("validation", 2), ("after validation", 2)],
    "epochs": [("epoch end", 1), ("epoch start", 1), ("epoch end", 1), ("export", 1), ("export", 1)],
    "files": [
        ("checkpoint", 1),
        ("checkpoint bytes", 2),
        ("previous", 1),
        ("checkpoint flush", 2),
        ("checkpoint bytes", 1),
    ],
    "metrics": [("metrics", 1), ("metrics header", 2), ("metrics", 5), ("metrics header", 1), ("metrics", 3)],
}
ITERATION = [("rollout", 9), ("scoring", 7), ("update", 26), ("update", 7), ("log", 8)]


def name_of(method, die, extra=""):
    return f"{method}-{die[0].replace(' ', '_')}-{die[1]}{extra}"


def killed(crew, method, name, *deaths, more=(), ranks=1):
    """Let a run die at each of the places in turn, then let it end."""
    first, *later = [Signal(*die) for die in deaths]
    run, folder = crew.run(method, name, *more, ranks=ranks, die=first)
    for die in [*later, None]:
        assert run.join()[0] == -signal.SIGKILL, run.log.read_text()[-3000:]
        run = crew.go_on(method, name, *more, ranks=ranks, die=die)
    assert run.join() == [0] * ranks, run.log.read_text()[-3000:]
    return folder


@pytest.mark.parametrize(
    ("method", "die"),
    [
        ("sft", ("batch", 19)),
        ("ppo", ("update", 31)),
        ("grpo", ("update", 31)),
        ("kto", ("batch", 19)),
        ("online_dpo", ("update", 31)),
    ],
)
def test_killed_once(crew, whole, method, die):
    assert differences(whole(method), killed(crew, method, name_of(method, die), die)) == []


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("method", BRIEF)
def test_killed_again_and_again(crew, whole, method, chain):
    assert differences(whole(method), killed(crew, method, f"{method}-{chain}", *CHAINS[chain])) == []


@pytest.mark.slow
def test_killed_inside_iterations(crew, whole):
    assert differences(whole("ppo"), killed(crew, "ppo", "ppo-iterations", *ITERATION)) == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("method", BRIEF)
def test_loader_workers_change_nothing(crew, whole, method, workers):
    """They have read ahead of the checkpoint; and a run may go on with another number of them."""
    more = ("--data.num_workers", str(workers))
    folder = killed(crew, method, f"{method}-workers-{workers}", ("batch", 8), ("batch", 9), more=more)
    assert differences(whole(method), folder) == []


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["sft", "ppo"])
@pytest.mark.parametrize(
    "more",
    [
        ("--trainer.max_steps", "9"),
        ("--trainer.limit_train_batches", "6", "--trainer.max_epochs", "4", "--trainer.val_check_interval", "3"),
        ("--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", "5"),
        ("--trainer.limit_val_batches", "0"),
        ("--checkpoint.every_n_batches", "null", "--checkpoint.every_minutes", "0"),
        ("--checkpoint.monitor", "eval/num_tokens", "--checkpoint.save_top_k", "2"),
    ],
    ids=lambda more: more[0].split(".")[1],
)
def test_other_ways_to_count(crew, whole, method, more):
    """max_steps makes Lightning restart by another path; a limit ends epochs before the rows do."""
    if method == "ppo":
        steps = {"--trainer.max_steps": "72", "--checkpoint.monitor": "eval/sampled/kl"}
        more = (more[0], steps.get(more[0], more[1]), *more[2:])
    deaths = [("batch", 8), ("epoch end", 1), ("epoch start", 1), ("batch", 3)]
    folder = killed(crew, method, f"{method}-{more[0][2:]}", *deaths, more=more)
    assert differences(whole(method, *more), folder) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        *(pytest.param(method, "ddp", marks=() if method in FAST else pytest.mark.exhaustive) for method in METHODS),
        ("sft", "fsdp2"),
        ("ppo", "fsdp2"),
    ],
)
def test_two_ranks(crew, whole, method, strategy):
    die = ("batch", 8) if method not in SAMPLING else ("update", 22)  # there are six batches an epoch
    more = ("--trainer.strategy", strategy)
    folder = killed(crew, method, f"{method}-{strategy}", die, ("validation", 1), more=more, ranks=2)
    assert differences(whole(method, *more, ranks=2), folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", BRIEF)
def test_the_command_line_as_it_is_typed(crew, whole, method, tmp_path):
    """The same, by `python -m rlhf_lightning`, killed while its first checkpoint but one is the last."""
    command = [sys.executable, "-m", "rlhf_lightning", *arguments(method, crew.base, tmp_path / "run")]
    environment = os.environ | {"RLHF_LIGHTNING_CACHE": str(crew.cache), "OMP_NUM_THREADS": "1"}
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    while (
        not last.exists()
        or torch.load(last, weights_only=True)["loops"]["fit_loop"]["epoch_progress"]["total"]["ready"] < 2
    ):
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not (tmp_path / "run" / "export").exists()
    subprocess.run([*command, "--ckpt_path", "last"], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert differences(whole(method), tmp_path / "run") == []


@pytest.mark.parametrize("method", ["sft", "ppo"])
def test_a_checkpoint_holds_the_trained_weights_and_the_state_and_nothing_else(crew, whole, method):
    path = whole(method) / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    state_dict, optimizer = checkpoint["state_dict"], checkpoint["optimizer_states"][0]["state"]
    trained = ("policy.",) if method == "sft" else ("actor_critic.policy.", "actor_critic.critic.")
    assert all(key.startswith(trained) for key in state_dict)
    assert "hyper_parameters" not in checkpoint
    weights = {weight.data_ptr(): weight.nbytes for weight in state_dict.values()}
    moments = sum(moment.nbytes for state in optimizer.values() for moment in state.values())
    assert moments == pytest.approx(2 * sum(weights.values()), rel=0.05)
    generators = all_bytes(checkpoint["run"]["ranks"][0]["random"]) + all_bytes(
        checkpoint.get("ppo", {}).get("order", [])
    )
    assert generators == 5056 * (method == "ppo") + 5056 + 8 * (
        625 + 624
    )  # torch's, and the words of Python's and NumPy's
    rest = all_bytes(checkpoint) - all_bytes(state_dict) - moments - generators
    assert rest < 2500  # a batch to show, and what was counted: a tenth of the smallest network


def all_bytes(value):
    """Of all tensors inside."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(all_bytes(part) for part in parts)
