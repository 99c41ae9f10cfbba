"""What Lightning's precision plugins do to batches, torch's default dtype and metrics, and which precisions are refused."""

import math
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision, Precision

from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.splits import Split
from rlhf_lightning.errors import UserError
from rlhf_lightning.losses import DPOLoss
from rlhf_lightning.models.precision import weight_dtypes
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import DPOModule, KTOModule
from rlhf_lightning.modules.half_precision import prepare_precision
from rlhf_lightning.modules.metrics import Means
from rlhf_lightning.modules.moving_reference import MovingReference
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.worlds import HHHWorld
from tests.invariance.subjects import Memory
from tests.precision.methods import METHODS, TINY, TRAINED, fit, folders, still


def module_of(name):
    return METHODS[name].build(ModelSpec(architecture=TINY), "")


@pytest.mark.parametrize("precision", ["16-true", "transformer-engine", "64-true"])
@pytest.mark.parametrize("name", TRAINED)
def test_other_precisions_are_refused_in_one_line(name, precision):
    module = module_of(name)
    module._trainer = SimpleNamespace(precision=precision, precision_plugin=Precision(), strategy=None)
    with pytest.raises(
        UserError, match=rf"^trainer.precision {precision} is not supported; use one of 32-true, bf16-m"
    ):
        module.configure_model()


def test_a_second_trainers_precision_is_checked_too():
    module = module_of("sft")
    fit(module, "texts", "32-true")
    module._trainer = SimpleNamespace(precision="16-true", precision_plugin=Precision(), strategy=None)
    with pytest.raises(UserError, match="16-true is not supported"):
        module.configure_model()


@pytest.mark.parametrize("name", TRAINED)
def test_the_numbers_of_a_batch_stay_float32(name):
    """Reference log-probabilities of -200 nats would be rounded to whole nats."""
    module, seen = module_of(name), []
    step = module.training_step

    def look(batch, batch_idx):
        seen.extend(x.dtype for x in batch if isinstance(x, torch.Tensor) and x.is_floating_point())
        seen.append(torch.tensor(0.5).dtype)  # torch's default, which a user's reward function would get
        return step(batch, batch_idx)

    module.training_step = look
    fit(module, METHODS[name].rows, "bf16-true")
    assert set(seen) == {torch.float32}
    assert torch.get_default_dtype() == torch.float32


def test_a_rewards_own_tensors_are_not_rounded():
    """1000.5 has no bfloat16."""
    module = METHODS["ppo, shared trunk"].build(ModelSpec(architecture=TINY), "")
    module.reward = module.scorer.reward = FunctionReward(
        lambda completions: torch.tensor([1000.5] * len(completions)).tolist()
    )
    logged = fit(module, "prompts", "bf16-true")[0]
    assert logged["objective/scores"] == 1000.5


def test_metrics_count_beyond_256():
    means = Means(["loss"])
    holder = torch.nn.ModuleList([means]).to(torch.bfloat16)
    for _ in range(1000):
        holder[0].update({"loss": (torch.tensor(0.3), 1)})
    assert means.counts.dtype == torch.float32
    assert means.counts[0] == 1000
    assert float(means.compute()["loss"]) == pytest.approx(0.3, rel=1e-5)
    means.reset()
    means.update({"loss": (torch.tensor(1 / 3), 1)})
    assert means.compute()["loss"] == torch.tensor(1 / 3)


@pytest.mark.parametrize("kind", [DPOModule, KTOModule])
def test_a_reference_of_its_own_computes_as_the_policy_does(kind, base):
    """Named by itself, in the default dtype, beside a policy in bfloat16: the same weights, and so the same numbers."""
    policy, _ = folders(base)
    module = kind(ModelSpec(path=policy, dtype="bfloat16"), reference=ModelSpec(path=policy), optimizer=still)
    rows = "pairs" if kind is DPOModule else "unpaired"
    logged = fit(module, rows, "32-true")[0]
    assert weight_dtypes(module.reference.network) == {torch.bfloat16}
    assert logged["rewards/margins"] == 0


def test_a_moving_reference_in_half_precision_would_stand_still():
    module = DPOModule(
        ModelSpec(architecture=TINY), optimizer=still, moving_reference=MovingReference(every=1, alpha=0.1)
    )
    with pytest.raises(UserError, match=r"lost in its rounding: set moving_reference\.alpha to 1"):
        fit(module, "pairs", "bf16-true")


def test_a_moving_reference_that_takes_the_policys_place_may_be_in_half_precision():
    module = DPOModule(
        ModelSpec(architecture=TINY), optimizer=still, moving_reference=MovingReference(every=1, alpha=1.0)
    )
    assert fit(module, "pairs", "bf16-true")[0]["rewards/margins"] == 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_reference_log_probabilities_from_before_training_are_those_of_the_policy(precision, tmp_path, monkeypatch):
    """They are computed in configure_model, where Lightning has not cast the policy yet."""
    monkeypatch.setenv("RLHF_LIGHTNING_CACHE", str(tmp_path / "cache"))
    world = HHHWorld(seed=0, demonstrations=4, preferences=8, prompts=4, held_out=4)
    module = DPOModule(ModelSpec(architecture=TINY), DPOLoss(beta=0.5), optimizer=still, precompute_reference=True)
    memory = Memory()
    settings = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu", precision=precision, max_steps=2, logger=memory, log_every_n_steps=1, **settings
    )
    trainer.fit(module, datamodule=PreferenceDataModule(world, batch_size=3, split=Split(validation=0)))
    assert module.reference is None
    losses = [row["train/loss"] for row in memory.rows if "train/loss" in row]
    assert losses == pytest.approx([math.log(2)] * 2, abs=1e-6)


def test_without_a_trainer_nothing_is_prepared():
    module = module_of("sft")
    prepare_precision(module)
    assert module._trainer is None


def test_only_weights_are_cast_under_bf16_true():
    module = module_of("dpo")
    fit(module, "pairs", "bf16-true")
    assert isinstance(module.trainer.precision_plugin, HalfPrecision)
    assert module.trainer.precision == "bf16-true"
    assert weight_dtypes(module) == {torch.bfloat16}
    assert {b.dtype for b in module.policy.buffers() if b.is_floating_point()} == {torch.float32}
