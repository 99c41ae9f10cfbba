"""A loss or gradient that is NaN or infinite: no step is taken, its batches are kept, weights and checkpoints stay."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from rlhf_lightning.callbacks.export import ExportAtEnd
from rlhf_lightning.data.demonstrations import DemonstrationDataModule
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.splits import Split
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import DPOModule, RewardModelModule, SFTModule
from rlhf_lightning.modules.guard import StepGuard, plain_data
from rlhf_lightning.rewards.function import FunctionReward
from tests.faults.faulty import Rows, fit, ppo, prompts, weights

ROOT = Path(__file__).parents[2]
WHOLE = Split(validation=0)


def sft(base):
    module = SFTModule(ModelSpec(path=str(base / "policy")), optimizer=adam)
    return module, DemonstrationDataModule(Rows(), batch_size=4, split=WHOLE)


def reward_model(base):
    module = RewardModelModule(ModelSpec(path=str(base / "policy")), optimizer=adam)
    return module, PreferenceDataModule(Rows(), batch_size=4, split=WHOLE)


def dpo(base):
    module = DPOModule(ModelSpec(path=str(base / "policy")), optimizer=adam)
    return module, PreferenceDataModule(Rows(), batch_size=4, split=WHOLE)


def online(base):
    return ppo(base, FunctionReward(lambda completion_ids: [float(len(ids)) for ids in completion_ids])), prompts()


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


METHODS = {"sft": sft, "reward model": reward_model, "dpo": dpo, "ppo": online}
# Rows a batch, tensors that a post-mortem must hold.
BATCHES = {
    "sft": (4, "response_mask"), "reward model": (8, "margin"), "dpo": (8, "margin"), "ppo": (4, "advantages"),
}  # fmt: skip


class Poison(Callback):
    """From optimizer step ``step`` on, one parameter's gradient holds one bad number; keeps weights and batches."""

    def __init__(self, step: int, value: float, parameter: int = -1):
        self.step, self.value, self.parameter = step, value, parameter
        self.before, self.batches = [], []

    def on_train_start(self, trainer, pl_module):
        self.name, parameter = list(pl_module.named_parameters())[self.parameter]

        def spoil(gradient):
            state = trainer.optimizers[0].state_dict()["state"]
            self.before.append((weights(pl_module), json.dumps(plain_data(state), default=torch.Tensor.tolist)))
            if trainer.global_step < self.step:
                return gradient
            spoilt = gradient.clone()
            spoilt.flatten()[0] = self.value
            return spoilt

        parameter.register_hook(spoil)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_step_is_not_taken_and_its_batches_are_kept(base, tmp_path, method, value):
    module, data = METHODS[method](base)
    poison, saver = Poison(3, value), ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    with pytest.raises(UserError) as caught:
        fit(module, data, tmp_path, max_epochs=2, callbacks=[poison, saver, ExportAtEnd()], enable_checkpointing=True)
    path = tmp_path / "postmortem" / "step_3.pt"
    message = str(caught.value)
    assert f"torch.load('{path}', weights_only=True)" in message
    assert "optimizer step 3" in message
    assert poison.name in message
    assert "\n" not in message

    before, optimizer = poison.before[-1]
    for name, weight in weights(module).items():
        assert torch.equal(weight, before[name]), name
    now = plain_data(module.trainer.optimizers[0].state_dict()["state"])
    assert json.dumps(now, default=torch.Tensor.tolist) == optimizer
    assert not (tmp_path / "export").exists()
    checkpoints = list(tmp_path.glob("*.ckpt"))
    assert checkpoints
    for checkpoint in checkpoints:
        state = torch.load(checkpoint, weights_only=True)
        assert state["global_step"] <= 3
        for name, weight in state["state_dict"].items():
            if "_means" not in name:
                assert weight.isfinite().all(), name

    found = torch.load(path, weights_only=True)
    size, column = BATCHES[method]
    assert (found["module"], found["step"]) == (type(module).__name__, 3)
    assert found["not_finite"] == [poison.name]
    assert str(found["grad_norm"]) == str(value)
    assert sum(len(batch["input_ids"]) for batch in found["batches"]) == size
    assert all(column in batch for batch in found["batches"])
    if method != "ppo":
        assert torch.equal(found["batches"][0]["input_ids"], poison.batches[3].input_ids)


def test_the_kept_batch_gives_the_kept_loss_again(base, tmp_path):
    """What the file is for: the same weights on the same batch do the same again."""
    module, data = sft(base)
    with pytest.raises(UserError):
        fit(module, data, tmp_path, max_epochs=1, callbacks=[Poison(2, float("nan"))])
    found = torch.load(tmp_path / "postmortem" / "step_2.pt", weights_only=True)
    batch = type("Batch", (), found["batches"][0])
    loss = module._loss(batch)[0] / batch.normalizer
    assert loss.item() == pytest.approx(found["loss"], rel=1e-6)


@pytest.mark.parametrize("method", ["sft", "reward model", "dpo"])
def test_a_loss_that_is_not_finite_is_found_though_its_gradient_were(base, tmp_path, method):
    module, data = METHODS[method](base)
    step, calls = module.training_step, []

    def infinite(batch, batch_idx):
        calls.append(batch_idx)
        loss = step(batch, batch_idx)
        if len(calls) == 2:
            module.guard.losses[-1] = torch.tensor(float("inf"))
        return loss

    module.training_step = infinite
    with pytest.raises(UserError, match=r"loss inf and gradient norm [0-9.]+ at optimizer step 1"):
        fit(module, data, tmp_path, max_epochs=1)


def test_with_accumulation_all_batches_of_the_step_are_kept(base, tmp_path):
    module, data = sft(base)
    poison = Poison(1, float("nan"))
    with pytest.raises(UserError, match="step 1"):
        fit(module, data, tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=[poison])
    found = torch.load(tmp_path / "postmortem" / "step_1.pt", weights_only=True)
    for kept, seen in zip(found["batches"], poison.batches[2:4], strict=True):
        assert torch.equal(kept["input_ids"], seen.input_ids)


def test_a_sound_run_keeps_nothing(base, tmp_path):
    module, data = sft(base)
    fit(module, data, tmp_path, max_epochs=1)
    assert not (tmp_path / "postmortem").exists()
    assert module.guard.batches == module.guard.losses == []


def test_float16_overflows_are_the_scalers_business(tmp_path):
    """Under 16-mixed, which needs a GPU, the gradient scaler skips such a step and tries a smaller scale."""
    trainer = SimpleNamespace(precision="16-mixed", world_size=1, global_rank=0, global_step=5, callback_metrics={})
    trainer.default_root_dir = tmp_path
    module = torch.nn.Linear(2, 2)
    module.trainer, guard = trainer, StepGuard()
    guard.saw([1], torch.tensor(1.0))
    guard.check(module, torch.tensor(float("inf")))
    assert guard.batches == []
    guard.saw([1], torch.tensor(float("nan")))
    with pytest.raises(UserError, match="step 5"):
        guard.check(module, torch.tensor(float("inf")))


def test_text_and_columns_of_prompts_are_plain_data(tmp_path):
    odd = {"a": [{"role": "user", "content": "x"}], 3: (None, True, 2.5), "when": Path("x")}
    torch.save(plain_data(odd), tmp_path / "x.pt")
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert loaded == {"a": [{"role": "user", "content": "x"}], "3": [None, True, 2.5], "when": "x"}


POISON = """
from lightning.pytorch import Callback

class PoisonOneRank(Callback):
    def on_train_start(self, trainer, pl_module):
        if trainer.global_rank == 1:
            step = pl_module.training_step
            pl_module.training_step = lambda *a: step(*a) * (float("nan") if trainer.global_step >= 2 else 1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_stop_together(base, tmp_path, strategy):
    code = tmp_path / "poison_of_one_rank.py"
    code.write_text(POISON)
    args = [
        "fit",
        "--model",
        "SFTModule",
        "--model.policy.path",
        str(base / "policy"),
        "--data",
        "DemonstrationDataModule",
    ]
    args += ["--data.source", "HHHWorld", "--data.source.demonstrations", "64", "--data.source.held_out", "4"]
    args += [
        "--data.batch_size",
        "4",
        "--trainer.limit_val_batches",
        "0",
        "--trainer.max_epochs",
        "1",
        "--wandb",
        "disabled",
    ]
    args += ["--trainer.devices", "2", "--trainer.strategy", strategy, "--trainer.accelerator", "cpu"]
    args += ["--samples.every_n_steps", "0", "--trainer.enable_progress_bar", "false", "--import", str(code)]
    args += ["--trainer.callbacks", '[{"class_path": "poison_of_one_rank.PoisonOneRank"}]']
    command = [sys.executable, "-m", "rlhf_lightning", *args, "--trainer.default_root_dir", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "optimizer step 2" in done.stderr
    assert not (tmp_path / "run" / "export").exists()
    found = sorted(path.name for path in (tmp_path / "run" / "postmortem").iterdir())
    assert found == ["step_2.pt", "step_2_rank1.pt"]
    parts = [torch.load(tmp_path / "run" / "postmortem" / name, weights_only=True) for name in found]
    assert not torch.equal(*(part["batches"][0]["input_ids"][:, :4] for part in parts))
