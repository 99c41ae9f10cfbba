"""DeepSpeed's ZeRO on two ranks over gloo does what one process does; run by `make deepspeed`."""

import csv
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rlhf_lightning.callbacks import checkpoint_file
from rlhf_lightning.errors import UserError
from rlhf_lightning.modules import zero
from rlhf_lightning.modules.zero import ZeROStrategy
from tests.resume.runs import arguments, differences

ONE = ("--data.batch_size", "8")
COMMON = ("--trainer.accumulate_grad_batches", "1", "--trainer.log_every_n_steps", "1", "--trainer.max_epochs", "1")
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed: `make deepspeed`"
)


def fit(folder, *more, method="sft"):
    args = arguments(method, folder.parent / "base", folder, *COMMON, *more)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RLHF_LIGHTNING_CACHE": str(folder.parent / "cache")}
    command = [sys.executable, "-m", "rlhf_lightning", *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def metrics(folder):
    with (folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def zero_flags(stage):
    strategy = f'{{"class_path": "rlhf_lightning.modules.zero.ZeROStrategy", "init_args": {{"stage": {stage}}}}}'
    return ("--trainer.strategy", strategy, "--trainer.devices", "2")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_two_ranks_are_one_process_and_go_on_bit_for_bit(tmp_path, stage):
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    code, said = fit(one, *ONE)
    assert code == 0, said[-3000:]
    code, said = fit(two, *zero_flags(stage))
    assert code == 0, said[-3000:]
    rows, others = metrics(one), metrics(two)
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    assert sum("train/grad_norm" in row for row in rows) == 6
    for row, other in zip(rows, others, strict=True):
        assert other == pytest.approx(row, rel=2e-5)
    weights, same = (load_file(folder / "export" / "model.safetensors") for folder in (one, two))
    assert {name: float((weights[name] - same[name]).abs().max()) for name in weights} == pytest.approx(
        dict.fromkeys(weights, 0.0), abs=1e-5
    )
    shares = checkpoint_file.read(two / "checkpoints" / "last.ckpt")["optimizer_states"][0]["shares"]
    moments = [share["optimizer"]["state"][0]["exp_avg"].numel() for share in shares]
    total = sum(weight.numel() for weight in weights.values())
    assert len(moments) == 2
    assert max(moments) <= 0.51 * total + 64  # each rank has half of them

    shutil.copytree(two, again)
    code, said = fit(again, *zero_flags(stage), "--ckpt_path", str(again / "checkpoints" / "previous.ckpt"))
    assert code == 0, said[-3000:]
    assert differences(two, again) == []


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.exhaustive
def test_what_another_strategy_wrote_is_refused(tmp_path):
    assert fit(tmp_path / "run", *ONE)[0] == 0
    code, said = fit(tmp_path / "run", *zero_flags(2), "--ckpt_path", "last")
    assert code == 2
    assert "optimizer state is of another strategy" in said


def test_without_deepspeed_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(zero, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'rlhf_lightning\[deepspeed\]'"):
        ZeROStrategy()


@pytest.mark.parametrize(
    ("automatic", "accumulate", "precision", "message"),
    [
        (False, 1, "32-true", "steps its own optimizer"),
        (True, 2, "32-true", "accumulate_grad_batches to 1"),
        (True, 1, "16-mixed", "not 16-mixed"),
    ],
)
def test_what_zero_does_otherwise_is_refused_before_it_is_built(automatic, accumulate, precision, message):
    module = SimpleNamespace(automatic_optimization=automatic)
    trainer = SimpleNamespace(lightning_module=module, accumulate_grad_batches=accumulate, precision=precision)
    with pytest.raises(UserError, match=message):
        ZeROStrategy.setup(ZeROStrategy.__new__(ZeROStrategy), trainer)


def test_copies_are_copies():
    """A checkpoint must not change while training goes on."""
    state = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}
    copied = zero.on_cpu(state)
    state["state"][0]["exp_avg"].zero_()
    assert copied["state"][0]["exp_avg"].tolist() == [1.0, 1.0]
    assert copied["param_groups"] == [{"lr": 0.1, "betas": [0.9, 0.99]}]
