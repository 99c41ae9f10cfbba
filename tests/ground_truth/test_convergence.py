"""PPO and DPO end where theory says, on several problems; the command says so, and says so when they do not."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from rlhf_lightning.evaluation.exact import Target, policy_logps
from rlhf_lightning.evaluation.gradients import Population, population_batch, preference_weights
from rlhf_lightning.losses import DPOLoss
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import DPOModule
from rlhf_lightning.modules.optimization import Schedule
from rlhf_lightning.worlds import EnumerableWorld

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def ground_truth(*args):
    command = [sys.executable, "-m", "rlhf_lightning", "ground-truth", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("method", "problem", "most_kl", "most_lost"),
    [
        ("ppo", 0, 1e-2, 3.0),
        pytest.param("dpo", 1, 5e-2, 100.0, marks=pytest.mark.exhaustive),
        pytest.param("rloo", 1, 1e-2, 3.0, marks=pytest.mark.exhaustive),
        pytest.param("grpo", 0, 1e-2, 3.0, marks=pytest.mark.exhaustive),
    ],
)
def test_training_reaches_the_optimum(tmp_path, method, problem, most_kl, most_lost):
    """As the README says: the command with its config. One problem each, for time; without `--problems` it takes three."""
    folder = tmp_path / "run"
    config = f"configs/ground_truth/{method}.yaml"
    done = ground_truth("-c", config, "--problems", str(problem), "--trainer.default_root_dir", str(folder))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(rf"^ +{problem} .* pass$", done.stdout, re.MULTILINE)
    (found,) = json.loads((folder / "ground_truth.json").read_text())["problems"]
    assert found["final"]["kl_to_optimum"] < most_kl
    assert found["final"]["lost_percent"] < most_lost
    assert found["gradient_error"] < 1e-5
    assert found["target"]["reference"]["kl_to_optimum"] > 0.1  # there was a way to go
    assert len(found["curve"]) > 10
    for point in found["curve"]:
        assert point["reward"] <= point["frontier_reward"] + 1e-3
    assert (folder / "ground_truth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.exhaustive
@pytest.mark.parametrize("problem", [0, 1, 2])
def test_dpo_on_the_population_of_pairs_reaches_the_optimum(tmp_path, problem):
    """No sampling noise: all 57 x 57 ordered pairs of each prompt in every step."""
    world = EnumerableWorld(problem, max_new_tokens=2)
    folder = export_folder(world.reference(), world.tokenizer(), tmp_path / "reference")
    module = DPOModule(
        ModelSpec(path=str(folder)),
        Population(DPOLoss(beta=1.0), preference_weights(world)),
        optimizer=partial(torch.optim.Adam, lr=2e-3),
        schedule=Schedule(decay="cosine"),
    )
    settings = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = pl.Trainer(accelerator="cpu", max_steps=300, gradient_clip_val=1.0, default_root_dir=tmp_path, **settings)
    trainer.fit(module, torch.utils.data.DataLoader([population_batch(world)] * 300, batch_size=None))
    with torch.no_grad():
        final = Target("DPO", world.ref_logps, world.rewards, beta=1.0).exact(policy_logps(module.policy, world))
    assert final.kl_to_optimum < 1.5e-2
    assert final.reward <= final.frontier_reward + 1e-3


def test_a_run_that_ends_far_from_the_optimum_fails(tmp_path):
    short = ["--trainer.max_steps", "8", "--trainer.default_root_dir", str(tmp_path / "run")]
    lengths = [
        f"--{key}.init_args.max_new_tokens=2"
        for key in ("data.init_args.source", "model.init_args.reward.init_args.world")
    ]
    config = ["-c", "configs/ground_truth/ppo.yaml", "--model.init_args.sampling.max_new_tokens", "2"]
    done = ground_truth(*config, *short, *lengths, "--problems", "4")
    assert done.returncode == 1, done.stderr[-2000:]
    assert re.search(r"^ +4 .* kl_to_optimum .* > 0.01; lost_percent .* > 3$", done.stdout, re.MULTILINE)
    again = ground_truth(*config, *short, *lengths, "--problems", "4")
    assert again.returncode == 2
    assert "holds another run; replace it (--overwrite true)" in again.stderr
