"""Tiny runs of each method in processes that can be killed, and what two of them must have in common."""

import errno
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from rlhf_lightning import cli
from rlhf_lightning.callbacks import checkpoint_file, checkpoint_shards, export, metrics_file
from rlhf_lightning.callbacks.run_checkpoint import RunCheckpoint
from rlhf_lightning.commands.quiet import be_quiet
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.worlds import world_tokenizer
from tests.methods import METHODS as REGISTRY

# What a command line runs, and which method of the registry that is.
NAMES = {
    "sft": "sft",
    "reward": "reward model",
    "rankings": "rankings, ensemble",
    "process": "process reward",
    "dpo": "dpo",
    "kto": "bco, unpaired",  # the loss of its family that remembers something from one step to the next
    "ppo": "ppo",
    "grpo": "grpo",
    "online_dpo": "online dpo",
}
METHODS = tuple(NAMES)
MODULES: dict[str, Any] = {name: REGISTRY[method].module for name, method in NAMES.items()}
SAMPLING = tuple(name for name, method in NAMES.items() if REGISTRY[method].samples)
FAST = ("sft", "ppo")
# What differs between methods shows in these two; the nightly run has every method.
BRIEF = [method if method in FAST else pytest.param(method, marks=pytest.mark.exhaustive) for method in METHODS]
FIELDS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
ARCHITECTURE = {"model_type": "llama", "max_position_embeddings": 128, **FIELDS}
ADAM = ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "0.003"]
# Two epochs of twelve batches, six optimizer steps each; nothing falls together: checkpoints every 5 batches, validations
# every 4, a log every 3 steps, samples every 7 batches.
COMMON = [
    *ADAM, "--model.schedule.warmup", "4", "--model.schedule.decay", "cosine", "--data.source", "HHHWorld",
    "--data.source.held_out", "8", "--data.batch_size", "4", "--trainer.max_epochs", "2", "--trainer.val_check_interval", "4",
    "--trainer.log_every_n_steps", "3", "--samples.every_n_steps", "7", "--samples.count", "1",
    "--checkpoint.every_n_batches", "5", "--trainer.accelerator", "cpu", "--wandb", "disabled",
    "--trainer.enable_progress_bar", "false",
]  # fmt: skip
OFFLINE = [*COMMON, "--trainer.accumulate_grad_batches", "2", "--trainer.gradient_clip_val", "1.0"]


def arguments(method: str, base: Path, folder: Path, *more: str) -> list[str]:
    """The command line of a run, from the command on."""
    policy, reward = str(base / "policy"), str(base / "reward")
    own = {
        "sft": [
            "--model", "SFTModule", "--model.policy.architecture", json.dumps(ARCHITECTURE), "--model.sampling.max_new_tokens",
            "4", "--data", "DemonstrationDataModule", *OFFLINE, "--data.source.demonstrations", "48",
        ],
        "reward": [
            "--model", "RewardModelModule", "--model.network.path", policy, "--data", "PreferenceDataModule", *OFFLINE,
            "--data.source.preferences", "48",
        ],
        "rankings": [
            "--model", "RewardModelModule", "--model.network.path", policy, "--model.ensemble.members", "2",
            "--model.ensemble.trunk", "own", "--model.calibrate", "true", "--data", "RankingDataModule", *OFFLINE,
            "--data.source.rankings", "48",
        ],
        "process": [
            "--model", "ProcessRewardModule", "--model.network.architecture", json.dumps(ARCHITECTURE), "--model.separator",
            ";", "--data", "StepwiseDataModule", *OFFLINE, "--data.source", "SumsWorld", "--data.source.held_out", "8",
            "--data.source.solutions", "48",
        ],
        "dpo": [
            "--model", "DPOModule", "--model.policy.path", policy, "--model.sampling.max_new_tokens", "4",
            "--data", "PreferenceDataModule", *OFFLINE, "--data.source.preferences", "48",
        ],
        "kto": [
            "--model", "KTOModule", "--model.policy.path", policy, "--model.loss", "BCOUnpairedLoss",
            "--model.sampling.max_new_tokens", "4", "--data", "UnpairedDataModule", *OFFLINE, "--data.source.unpaired", "48",
        ],
        "ppo": [
            "--model", "PPOModule", "--model.policy.path", policy, "--model.critic.path", reward, "--model.reward",
            "RewardModelReward", "--model.reward.path", reward, "--model.kl", "AdaptiveKL", "--model.kl.horizon", "100",
            "--model.kl.target", "0.1", "--model.update.epochs", "2", "--model.update.minibatch_size", "2",
            "--model.sampling.max_new_tokens", "6", "--data", "PromptDataModule", *COMMON, "--data.source.prompts", "48",
        ],
        "grpo": [
            "--model", "GRPOModule", "--model.policy.path", policy, "--model.reward", "RewardModelReward",
            "--model.reward.path", reward, "--model.advantages", "GroupMean", "--model.objective.aggregation", "token_mean",
            "--model.objective.kl_placement", "loss_k3_token", "--model.kl", "AdaptiveKL", "--model.kl.horizon", "100",
            "--model.kl.target", "0.1", "--model.groups.size", "2", "--model.groups.prompts", "1", "--model.update.epochs", "2",
            "--model.update.minibatch_size", "2", "--model.sampling.max_new_tokens", "6", "--data", "PromptDataModule", *COMMON,
            "--data.source.prompts", "48",
        ],
        "online_dpo": [
            "--model", "OnlineDPOModule", "--model.policy.path", policy, "--model.reward", "RewardModelReward",
            "--model.reward.path", reward, "--model.groups.size", "3", "--model.update.epochs", "2",
            "--model.update.minibatch_size", "4", "--model.sampling.max_new_tokens", "6", "--data", "PromptDataModule", *COMMON,
            "--data.source.prompts", "48",
        ],
    }  # fmt: skip
    return ["fit", *own[method], "--trainer.default_root_dir", str(folder), *more]


def make_base(folder: Path) -> Path:
    """A random policy and a random reward model as exported folders."""
    be_quiet()
    torch.manual_seed(0)
    tokenizer, spec = world_tokenizer(), ModelSpec(architecture=ARCHITECTURE)
    export_folder(load_causal_lm(spec, tokenizer), tokenizer, folder / "policy")
    export_folder(load_scalar_model(spec, tokenizer, new_head=True), tokenizer, folder / "reward")
    return folder


class Place(NamedTuple):
    """A function of the package; when it is entered, a run is in this phase."""

    phase: str
    owner: Any
    name: str


def places(method: str) -> list[Place]:
    """Where a run can be found, and killed."""
    module = MODULES[method]
    own = [
        Place("rollout", module, "_generate"),
        Place("scoring", module, "_score"),
        Place("update", module, "_step"),
        Place("log", module, "_finish"),
    ]
    return [
        *(own if method in SAMPLING else []),
        Place("epoch start", module, "on_train_epoch_start"),
        Place("batch", module, "training_step"),
        Place("validation", module, "validation_step"),
        Place("after validation", RunCheckpoint, "on_validation_end"),
        Place("epoch end", RunCheckpoint, "on_train_epoch_end"),
        Place("metrics", metrics_file.RunMetrics, "log_metrics"),
        Place("metrics header", metrics_file.RunMetrics, "_rewrite"),
        Place("checkpoint", checkpoint_file.WholeFiles, "save_checkpoint"),
        Place("checkpoint bytes", checkpoint_file, "write"),
        Place("checkpoint flush", checkpoint_file, "flush_folder"),
        Place("previous", checkpoint_file, "keep"),
        Place("shards", checkpoint_shards, "write_shards"),
        Place("shards folder", checkpoint_shards, "named"),
        Place("remove shards", checkpoint_file, "remove_unused"),
        Place("export", export, "export_folder"),
        Place("export", export, "export_members"),
    ]


FULL_DISK = 0  # no signal


class Signal(NamedTuple):
    """What a run sends itself when it enters a phase for the n-th time in this process."""

    phase: str
    entry: int
    number: int = signal.SIGKILL


class Watch:
    """Writes the phase of a run where the parent can read it, and sends the run a signal when its time has come."""

    def __init__(self, method: str, phase: Any, die: Signal | None) -> None:
        self.phase, self.die, self.entries = phase, die, 0
        for place in places(method):
            setattr(place.owner, place.name, self.wrapped(place.phase, getattr(place.owner, place.name)))

    def wrapped(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            before, self.phase.value = self.phase.value, phase.encode()
            if self.die is not None and self.die.phase == phase:
                self.entries += 1
                if self.entries == self.die.entry:
                    self.end(self.die, args)
            result = function(*args, **kwargs)
            self.phase.value = before or b"between"
            return result

        return watched

    def end(self, die: Signal, args: tuple[Any, ...]) -> None:
        """As a power cut would: nothing is flushed, nothing is cleared up; of a checkpoint, the first bytes are there."""
        if die.phase == "checkpoint bytes":
            args[1].write_bytes(b"PK\x03\x04" + bytes(1000))
        if die.number == FULL_DISK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), die.number)


def child(args: list[str], method: str, environment: dict[str, str], log: Path, phase: Any, die: Signal | None) -> None:
    """What a process of a run does; the packages are imported already."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers, as from a shell
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    Watch(method, phase, die)
    sys.argv = ["rlhf_lightning", *args]
    cli.main(args)


LOCK = threading.RLock()  # multiprocessing does not like to be asked after one process by two threads


class Run:
    """A run in one process a rank, begun at once."""

    def __init__(self, crew: "Crew", method: str, args: list[str], ranks: int = 1, die: Signal | None = None) -> None:
        self.started = time.monotonic()
        folder = Path(args[args.index("--trainer.default_root_dir") + 1])
        self.log = folder.with_suffix(".log")
        self.phases = [crew.context.RawArray("c", 64) for _ in range(ranks)]
        cache = {"RLHF_LIGHTNING_CACHE": str(crew.cache), "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            args = [args[0], "--trainer.strategy", "ddp", *args[1:], "--trainer.devices", str(ranks)]
            cache |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
        self.processes = [
            crew.context.Process(
                target=child,
                args=(args, method, cache | ({"LOCAL_RANK": str(rank)} if ranks > 1 else {}), self.log, phase, die),
            )
            for rank, phase in enumerate(self.phases)
        ]
        with LOCK:
            for process in self.processes:
                process.start()

    def join(self, timeout: float = 300.0) -> list[int | None]:
        """Wait for the end.

        Returns:
            The exit codes; minus the signal for a process that was killed.
        """
        while self.alive() and time.monotonic() - self.started < timeout:
            time.sleep(0.01)
        time.sleep(0 if len(self.processes) == 1 else 1)
        self.kill()  # whoever waits for a rank that is gone
        return [process.exitcode for process in self.processes]

    def alive(self) -> bool:
        """Whether the first rank is."""
        with LOCK:
            return self.processes[0].is_alive()

    def kill(self) -> str:
        """SIGKILL to every rank.

        Returns:
            What the first rank was at.
        """
        with LOCK:
            phase = self.phases[0].value.decode() or "start"
            alive = self.processes[0].is_alive()
            for process in self.processes:
                process.kill()
            for process in self.processes:
                process.join()
        return phase if alive else "over"

    def terminate(self, rank: int = 0) -> None:
        """SIGTERM to one rank."""
        self.processes[rank].terminate()

    def wait_for(self, phase: str) -> None:
        """Until the first rank is in a phase."""
        while self.phases[0].value.decode() != phase:
            assert self.alive(), f"{phase} never came: {self.log.read_text()[-2000:]}"
            time.sleep(0.001)


class Crew:
    """Starts processes that have imported everything already: by a fork of a server that has done nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "cache"
        os.environ["OMP_NUM_THREADS"] = "1"
        self.context: ForkServerContext = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.resume.runs"])
        self.base = make_base(folder / "base")

    def run(self, method: str, name: str, *more: str, ranks: int = 1, die: Signal | None = None) -> tuple[Run, Path]:
        """Begin a run in a folder of that name."""
        folder = self.folder / name
        return Run(self, method, arguments(method, self.base, folder, *more), ranks, die), folder

    def finish(self, method: str, name: str, *more: str, ranks: int = 1) -> Path:
        """Run to the end.

        Raises:
            RuntimeError: If that is no good end.
        """
        run, folder = self.run(method, name, *more, ranks=ranks)
        if (codes := run.join()) != [0] * ranks:
            raise RuntimeError(f"exit codes {codes}: {run.log.read_text()[-3000:]}")
        return folder

    def again(self, args: list[str], method: str) -> Run:
        """A run with a command line of its own."""
        return Run(self, method, args)

    def go_on(self, method: str, name: str, *more: str, ranks: int = 1, die: Signal | None = None) -> Run:
        """Go on with what was killed, if it had a checkpoint; else begin it again."""
        resumable = (self.folder / name / "checkpoints" / checkpoint_file.LAST).is_file()
        how = ["--ckpt_path", "last"] if resumable else ["--overwrite", "true"]
        return self.run(method, name, *more, *how, ranks=ranks, die=die)[0]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def differences(one: Path, other: Path) -> list[str]:
    """Where two finished runs differ: every logged number, the exported weights, and all that the last checkpoint holds."""
    weights = [{str(path.relative_to(run)) for path in run.glob("export/**/model.safetensors")} for run in (one, other)]
    if not weights[0] or weights[0] != weights[1]:  # an ensemble has a file for each member
        return [f"exports: {weights[0]} and {weights[1]}"]
    names = ["metrics.csv", *sorted(weights[0])]
    found = [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]
    last = [checkpoint_file.read(folder / "checkpoints" / checkpoint_file.LAST) for folder in (one, other)]
    for checkpoint in last:  # its state is the paths of the files that it keeps
        checkpoint["callbacks"] = {
            k: v for k, v in checkpoint["callbacks"].items() if not k.startswith("RunCheckpoint")
        }
    return found + unequal(*last, "last.ckpt")


def unequal(one: Any, other: Any, where: str) -> list[str]:
    """Where two nested values differ, bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in unequal(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [
            found for i, pair in enumerate(zip(one, other, strict=True)) for found in unequal(*pair, f"{where}/{i}")
        ]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    return [] if type(one) is type(other) and one == other else [where]
