"""Two ranks over gloo do what one does: DDP and FSDP2, on the same rows, to the last digits of float32."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
COMMON = [
    "--trainer.accelerator",
    "cpu",
    "--trainer.limit_val_batches",
    "2",
    "--wandb",
    "disabled",
    "--samples.every_n_steps",
    "2",
]
COMMON += [
    "--trainer.log_every_n_steps",
    "1",
    "--trainer.max_steps",
    "4",
    "--trainer.val_check_interval",
    "4",
    "--trainer.enable_progress_bar",
    "false",
]


def fit(folder: Path, config: str, *args: str) -> list[dict[str, str]]:
    command = [
        sys.executable,
        "-m",
        "rlhf_lightning",
        "fit",
        "--config",
        f"configs/quickstart/{config}.yaml",
        *COMMON,
        *args,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--trainer.default_root_dir", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    half = ["--trainer.devices", "2", "--data.init_args.batch_size", "32"]
    return folder, {
        "one": fit(folder / "one", "sft"),
        "ddp": fit(folder / "ddp", "sft", *half, "--trainer.strategy", "ddp"),
        "fsdp2": fit(folder / "fsdp2", "sft", *half, "--trainer.strategy", "fsdp2"),
    }


@pytest.mark.parametrize("other", ["ddp", "fsdp2"])
def test_ranks_change_nothing(runs, other):
    _, metrics = runs
    one, two = ([row for row in metrics[name] if row["train/loss"]] for name in ("one", other))
    assert len(one) == len(two) == 4
    for expected, got in zip(one, two, strict=True):
        for name in ("loss", "entropy", "mean_token_accuracy", "grad_norm", "num_tokens"):
            assert float(got[f"train/{name}"]) == pytest.approx(float(expected[f"train/{name}"]), rel=2e-5), name


@pytest.mark.parametrize("other", ["ddp", "fsdp2"])
def test_ranks_change_no_validation_metric_either(runs, other):
    _, metrics = runs
    one, two = (next(row for row in reversed(metrics[name]) if row["eval/loss"]) for name in ("one", other))
    for name in ("eval/loss", "eval/entropy", "eval/mean_token_accuracy"):
        assert float(two[name]) == pytest.approx(float(one[name]), rel=2e-5), name


def test_the_shards_are_exported_as_one_folder(runs):
    folder, _ = runs
    one, two = (
        AutoModelForCausalLM.from_pretrained(folder / name / "export").state_dict() for name in ("ddp", "fsdp2")
    )
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert (weight - two[name]).abs().max() < 1e-5, name
