"""What a user plugs in from Python: classes of one's own, paths as models, rows in memory, batches of one's own."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from rlhf_lightning.batches import SequenceBatch
from rlhf_lightning.data.demonstrations import DemonstrationDataModule
from rlhf_lightning.data.sources import DatasetSource, as_source
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.losses import (
    BradleyTerryLoss,
    DPOLoss,
    FDPOLoss,
    LabelledLoss,
    ListLoss,
    MixedLoss,
    PairLoss,
    PolicyLoss,
    PolicyObjective,
    RankingLoss,
    StepLoss,
    UnpairedLoss,
    WPOLoss,
)
from rlhf_lightning.losses.checks import abstract_methods, require_interface
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import (
    DPOModule,
    GRPOModule,
    KTOModule,
    OnlineDPOModule,
    PPOModule,
    ProcessRewardModule,
    RewardModelModule,
    SFTModule,
)
from rlhf_lightning.modules.batch_checks import check_batch
from rlhf_lightning.modules.online import refuse_trainer_steps
from rlhf_lightning.rewards.composite import WeightedRewards
from rlhf_lightning.rewards.ensemble import Combination, EnsembleReward
from rlhf_lightning.rewards.judge import Judge, WinRateReward
from rlhf_lightning.rewards.reward import Reward
from rlhf_lightning.rewards.world import GoldReward
from rlhf_lightning.rollouts.advantages import AdvantageEstimator
from rlhf_lightning.rollouts.group_advantages import GroupMean
from rlhf_lightning.rollouts.kl_control import FixedKL, KLControl
from rlhf_lightning.worlds import HHHWorld
from tests.integration.test_bad_input import policy_folder

REWARD = GoldReward(HHHWorld())
OBJECTIVE = PolicyObjective("token_mean", "reward_k1")


class Duck:
    """A class of a user who has read no documentation."""

    def __call__(self, logits):
        return logits


def grpo(**changes):
    parts = {"reward": REWARD, "advantages": GroupMean(), "objective": OBJECTIVE, "kl": FixedKL(), **changes}
    return GRPOModule("x", **parts)


# ---------------------------------------------------------------- classes of one's own

PLACES = {
    "DPO's loss": (lambda x: DPOModule("x", loss=x), PairLoss),
    "online DPO's loss": (lambda x: OnlineDPOModule("x", REWARD, loss=x), PairLoss),
    "KTO's loss": (lambda x: KTOModule("x", loss=x), UnpairedLoss),
    "the reward model's loss": (lambda x: RewardModelModule("x", loss=x), RankingLoss),
    "the process reward model's loss": (lambda x: ProcessRewardModule("x", loss=x), StepLoss),
    "GRPO's loss": (lambda x: PolicyObjective("token_mean", "reward_k1", loss=x), PolicyLoss),
    "GRPO's advantages": (lambda x: grpo(advantages=x), AdvantageEstimator),
    "GRPO's KL": (lambda x: grpo(kl=x), KLControl),
    "GRPO's reward": (lambda x: grpo(reward=x), Reward),
    "PPO's advantages": (lambda x: PPOModule("x", None, REWARD, advantages=x), AdvantageEstimator),
    "PPO's KL": (lambda x: PPOModule("x", None, REWARD, kl=x), KLControl),
    "PPO's reward": (lambda x: PPOModule("x", None, x), Reward),
    "the engine": (lambda x: PPOModule("x", None, REWARD, sampling=SamplingParameters(engine=x)), None),
    "a part of a loss": (lambda x: MixedLoss([DPOLoss(), x], [1.0, 1.0]), PairLoss),
    "a weighed loss": (lambda x: WPOLoss(x), PairLoss),
    "a divergence": (lambda x: FDPOLoss(divergence=x), None),
    "a part of a reward": (lambda x: WeightedRewards([x]), Reward),
    "a judge": (lambda x: WinRateReward(x), Judge),
    "a combination": (lambda x: EnsembleReward("x", x), Combination),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_lacks_a_method_is_refused_when_it_is_given_and_the_signature_is_shown(place):
    build, base = PLACES[place]
    with pytest.raises(UserError, match=r"Duck has no .*; write a subclass of rlhf_lightning\.[\w.]+ with ") as refusal:
        build(Duck())
    assert len(refusal.value.lines) == 1
    for name in abstract_methods(base) if base else ():
        assert f"def {name}(" in str(refusal.value)


class WrongArguments(PairLoss):
    reward_scale = 1.0

    def pairs(self, chosen, rejected):
        return chosen - rejected


def test_another_signature_is_refused_with_both(tmp_path):
    with pytest.raises(UserError) as refusal:
        DPOModule("x", loss=WrongArguments())
    assert "WrongArguments has pairs(self, chosen, rejected), which can't be called" in str(refusal.value)
    assert "def pairs(self, pairs: Pairs) -> Tensor" in str(refusal.value)


class OtherNames(RankingLoss):
    """Other names, and a default more, are no other signature."""

    def pairs(self, better, worse, gap, sure=None, extra=1):
        return worse - better


class NoWeights(UnpairedLoss):
    reward_scale = 1.0

    def rows(self, logratio, desirable, baseline):
        return logratio


def test_what_can_be_called_as_it_will_be_is_accepted():
    RewardModelModule("x", loss=OtherNames())
    RewardModelModule("x", loss=BradleyTerryLoss())
    require_interface("kl", SimpleNamespace(coef=0.1, update=print, state=dict, load_state=print), KLControl)


def test_attributes_count_too():
    with pytest.raises(UserError, match="NoWeights has no desirable_weight, undesirable_weight; write a subclass"):
        KTOModule("x", loss=NoWeights())


def test_a_class_instead_of_an_object_is_said():
    with pytest.raises(UserError, match=r"loss: DPOLoss is a class; give an object, DPOLoss\(\.\.\.\)"):
        DPOModule("x", loss=DPOLoss)


def test_a_function_as_a_reward_says_what_wraps_it():
    def praise(completions, **_):
        return [1.0] * len(completions)

    with pytest.raises(UserError, match=r"reward: praise is a function; give FunctionReward\(praise\)"):
        PPOModule("x", None, praise)


def test_a_loss_that_fits_none_of_several_bases_shows_all():
    with pytest.raises(UserError) as refusal:
        RewardModelModule("x", loss=Duck())
    for base in (RankingLoss, ListLoss, LabelledLoss):
        assert base.__name__ in str(refusal.value)


# ---------------------------------------------------------------- paths as models


@pytest.mark.parametrize("path", ["some/folder", Path("some/folder")], ids=["text", "path"])
def test_a_path_is_enough_to_name_a_model(path):
    spec = ModelSpec(path="some/folder")
    assert SFTModule(policy=path).policy_spec == spec
    assert DPOModule(path, reference=path).reference_spec == spec
    assert KTOModule(path, reference=path).reference_spec == spec
    assert RewardModelModule(path).network_spec == spec
    assert ProcessRewardModule(path).network_spec == spec
    ppo = PPOModule(path, path, REWARD)
    assert (ppo.policy_spec, ppo.critic_spec) == (spec, spec)
    assert grpo().policy_spec.path == "x"
    assert OnlineDPOModule(path, REWARD).policy_spec == spec
    assert SFTModule(path).model_path == "some/folder"


def test_anything_else_is_refused():
    with pytest.raises(UserError, match="a model is given as a path, a hub id or a ModelSpec"):
        SFTModule(torch.nn.Linear(1, 1))


# ---------------------------------------------------------------- rows in memory

ROWS = [{"prompt": f"p {i}", "completion": "c"} for i in range(4)]


@pytest.mark.parametrize(
    "source",
    [Dataset.from_list(ROWS), DatasetDict({"train": Dataset.from_list(ROWS)}), ROWS],
    ids=["Dataset", "DatasetDict", "list"],
)
def test_rows_in_memory_are_a_source(source):
    data = DemonstrationDataModule(source)
    assert isinstance(data.source, DatasetSource)
    assert data.source.load("demonstrations")["train"].to_list() == ROWS
    assert str(data.source) == "the given dataset"  # in messages, which are one line


def test_a_source_that_is_none_is_refused():
    with pytest.raises(UserError, match="source is a dict; give a path, a hub id, a Dataset"):
        as_source({"prompt": ["a"]})


# ---------------------------------------------------------------- batches of one's own

MODULES = {
    "SequenceBatch": (lambda: SFTModule("x"), "DemonstrationDataModule"),
    "PreferenceBatch": (lambda: DPOModule("x"), "PreferenceDataModule"),
    "UnpairedBatch": (lambda: KTOModule("x"), "UnpairedDataModule"),
    "RankingBatch": (lambda: RewardModelModule("x"), "RankingDataModule"),
    "StepwiseBatch": (lambda: ProcessRewardModule("x"), "StepwiseDataModule"),
    "PromptBatch": (lambda: PPOModule("x", None, REWARD), "PromptDataModule"),
    "PromptBatch of GRPO": (grpo, "PromptDataModule"),
    "PromptBatch of online DPO": (lambda: OnlineDPOModule("x", REWARD), "PromptDataModule"),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("loop", ["train", "validation", "test", "predict"])
def test_a_dictionary_as_a_batch_names_the_data_module(kind, loop):
    build, data_module = MODULES[kind]
    module = build()
    with pytest.raises(UserError) as refusal:
        getattr(module, f"on_{loop}_batch_start")({"input_ids": torch.zeros(1), "labels": torch.zeros(1)}, 0)
    (line,) = refusal.value.lines
    assert f"{type(module).__name__} reads a" in line
    assert kind.split()[0] in line
    assert "not a dict with input_ids, labels" in line
    assert data_module in line


def test_other_batches_are_named_too():
    with pytest.raises(UserError, match="not a Tensor; give the trainer a DemonstrationDataModule"):
        check_batch(SFTModule("x"), torch.zeros(2), (SequenceBatch,))


def test_in_a_fit_it_is_the_only_thing_that_is_said(tmp_path):
    """The user's own DataLoader, and no data module."""
    folder = policy_folder(tmp_path)
    loader = DataLoader([{"input_ids": torch.ones(4, dtype=torch.int64)}] * 2, batch_size=2)
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    module = SFTModule(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*have overridden.*")
        with pytest.raises(UserError, match="SFTModule reads a SequenceBatch, not a dict with input_ids"):
            trainer.fit(module, loader)


# ---------------------------------------------------------------- keys of the Trainer that are not for these methods


@pytest.mark.parametrize("build", [lambda: PPOModule("x", None, REWARD), grpo, lambda: OnlineDPOModule("x", REWARD)])
def test_clipping_and_accumulation_name_the_keys_that_do_it(build):
    module = build()
    module._trainer = SimpleNamespace(gradient_clip_val=0.5, accumulate_grad_batches=1)
    with pytest.raises(
        UserError, match=r"gradient_clip_val 0\.5: .*set model\.update\.max_grad_norm to 0\.5 \(it is 1\)"
    ):
        refuse_trainer_steps(module)
    module._trainer = SimpleNamespace(gradient_clip_val=None, accumulate_grad_batches=2)
    with pytest.raises(UserError) as refusal:
        module.configure_callbacks()
    for key in ("model.update.minibatch_size", "model.update.micro_batch_size", "data.batch_size"):
        assert key in str(refusal.value)
    module._trainer = SimpleNamespace(gradient_clip_val=None, accumulate_grad_batches=1)
    assert module.configure_callbacks() == []
