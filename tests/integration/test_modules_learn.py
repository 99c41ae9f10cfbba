"""Does it learn? Each method on a problem small enough that failing it means a bug."""

import lightning.pytorch as pl
import pytest
import torch
from datasets import Dataset, DatasetDict

from rlhf_lightning.data.demonstrations import DemonstrationDataModule
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.sources import Source
from rlhf_lightning.data.splits import Split
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.losses import BradleyTerryLoss, DPOLoss, IPOLoss
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import DPOModule, PPOModule, RewardModelModule, SFTModule
from rlhf_lightning.modules.optimization import Schedule
from rlhf_lightning.modules.ppo import PPOUpdate
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rollouts.kl_control import AdaptiveKL, FixedKL
from rlhf_lightning.worlds import HHHWorld, world_tokenizer

WORLD = HHHWorld(seed=0, demonstrations=8, preferences=8, prompts=64, held_out=8)


class Rows(Source):
    """Rows of a world, the training ones alone."""

    def __init__(self, rows: Dataset):
        self.rows = rows

    def load(self, kind):
        return DatasetDict(train=self.rows)

    def tokenizer(self):
        return world_tokenizer()


def eight(kind: str) -> Rows:
    return Rows(WORLD.load(kind)["train"])


def adam(lr: float):
    return lambda params: torch.optim.AdamW(params, lr=lr, weight_decay=0.0)


def fit(module, data, tmp_path, **trainer):
    pl.seed_everything(0, verbose=False)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings |= {"enable_checkpointing": False, "default_root_dir": tmp_path, "num_sanity_val_steps": 0}
    runner = pl.Trainer(**settings | trainer)
    runner.fit(module, datamodule=data)
    return runner


@pytest.fixture
def base(tmp_path, tiny):
    """A random policy and a random reward model as exported folders."""
    torch.manual_seed(0)
    tokenizer = world_tokenizer()
    spec = ModelSpec(architecture=tiny)
    export_folder(load_causal_lm(spec, tokenizer), tokenizer, tmp_path / "policy")
    export_folder(load_scalar_model(spec, tokenizer, new_head=True), tokenizer, tmp_path / "reward")
    return tmp_path


def test_sft_overfits_eight_demonstrations(tmp_path, tiny):
    module = SFTModule(ModelSpec(architecture=tiny), optimizer=adam(1e-2))
    data = DemonstrationDataModule(eight("demonstrations"), batch_size=8, split=Split(validation=0))
    fit(module, data, tmp_path, max_steps=120)
    batch = next(iter(data.train_dataloader()))
    output, mask = module(batch), batch.response_mask[:, 1:]
    assert -output.logprobs.sum() / mask.sum() < 0.1  # ln 142 = 4.96 at the start
    assert output.greedy.sum() / mask.sum() > 0.95


def test_the_reward_model_overfits_eight_pairs(base):
    module = RewardModelModule(ModelSpec(path=str(base / "policy")), BradleyTerryLoss(), optimizer=adam(3e-3))
    data = PreferenceDataModule(eight("preferences"), batch_size=8, split=Split(validation=0))
    fit(module, data, base, max_steps=60)
    chosen, rejected = module(next(iter(data.train_dataloader()))).chunk(2)
    assert (chosen > rejected).all()
    assert -torch.nn.functional.logsigmoid(chosen - rejected).mean() < 0.1


def test_the_reward_models_scores_are_normalised_on_its_training_responses(base):
    module = RewardModelModule(ModelSpec(path=str(base / "policy")), optimizer=adam(3e-3))
    data = PreferenceDataModule(eight("preferences"), batch_size=8, split=Split(validation=0))
    fit(module, data, base, max_steps=20)
    batch = next(iter(data.train_dataloader()))
    scores = module.network(batch.input_ids, batch.attention_mask)
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("loss", [DPOLoss(beta=0.2), IPOLoss(tau=0.2)])
def test_dpo_overfits_eight_pairs_and_leaves_the_reference_alone(base, loss):
    module = DPOModule(ModelSpec(path=str(base / "policy")), loss, optimizer=adam(1e-3))
    data = PreferenceDataModule(eight("preferences"), batch_size=8, split=Split(validation=0))
    fit(module, data, base, max_steps=60)
    batch = next(iter(data.train_dataloader()))
    mask = batch.response_mask[:, 1:]
    inputs = batch.input_ids, batch.attention_mask, batch.response_mask
    chosen, rejected = ((module.policy(*inputs).logprobs - module.reference(*inputs).logprobs) * mask).sum(1).chunk(2)
    assert (chosen - rejected).min() > (1 if isinstance(loss, DPOLoss) else 0.5 / (2 * loss.tau))
    untouched = load_causal_lm(module.policy_spec, module.tokenizer).state_dict()
    for name, weight in module.reference.network.network.state_dict().items():
        torch.testing.assert_close(weight, untouched[name], rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_ppo_in_half_precision_samples_and_scores_alike(base, precision):
    """Engine and update round differently, by hundredths of a nat; a wrong mask or position would show as tenths."""
    seen = []
    module = PPOModule(
        ModelSpec(path=str(base / "policy")),
        ModelSpec(path=str(base / "reward")),
        FunctionReward(count_green),
        sampling=SamplingParameters(max_new_tokens=6),
        update=PPOUpdate(epochs=1, minibatch_size=64),
        optimizer=adam(3e-3),
    )
    update = module.update_means.update
    module.update_means.update = lambda values: (seen.append(values), update(values))
    data = PromptDataModule(Rows(WORLD.load("prompts")["train"]), batch_size=64, split=Split(validation=0))
    fit(module, data, base, max_steps=3, precision=precision)
    name = "sampling/sampling_logp_difference/max"
    apart = [float(v[name][0]) for v in seen if name in v]
    assert max(apart) < 0.1  # rounding; none where kernels add in the same order
    assert all(v["grad_norm"][0] > 0 for v in seen if "grad_norm" in v)


def count_green(completions):
    return [c[0]["content"].split().count("green") for c in completions]


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_ppo_learns_to_emit_a_token(base, critic):
    """Reward is how often "green" is said; at random it is said 6 / 142 times in six words."""
    module = PPOModule(
        ModelSpec(path=str(base / "policy")),
        ModelSpec(path=str(base / "reward")) if critic == "separate" else None,
        FunctionReward(count_green),
        kl=FixedKL(0.0),
        sampling=SamplingParameters(max_new_tokens=6),
        update=PPOUpdate(epochs=2, minibatch_size=32, micro_batch_size=16),
        optimizer=adam(3e-3),
        schedule=Schedule(decay="constant"),
    )
    data = PromptDataModule(Rows(WORLD.load("prompts")["train"]), batch_size=64, split=Split(validation=0))
    fit(module, data, base, max_steps=4 * 30)
    _, scores = module.last_rollout
    assert scores.mean() > 3
    assert module.iteration == 30
    assert module.episodes == 30 * 64


def test_ppo_with_a_strong_kl_penalty_stays_where_it_is(base):
    module = PPOModule(
        ModelSpec(path=str(base / "policy")),
        None,
        FunctionReward(count_green),
        kl=AdaptiveKL(init=50.0),
        sampling=SamplingParameters(max_new_tokens=6),
        update=PPOUpdate(epochs=1, minibatch_size=64),
        optimizer=adam(3e-3),
    )
    data = PromptDataModule(Rows(WORLD.load("prompts")["train"]), batch_size=64, split=Split(validation=0))
    fit(module, data, base, max_steps=20)
    assert module.last_rollout[1].mean() < 0.5
    assert module.kl.coef < 50.0  # the KL is far below its target, so the controller lets go


def test_ppos_first_minibatch_has_ratio_one_and_no_clipping(base):
    seen = []
    module = PPOModule(
        ModelSpec(path=str(base / "policy")),
        ModelSpec(path=str(base / "reward")),
        FunctionReward(count_green),
        sampling=SamplingParameters(max_new_tokens=6, temperature=0.7),
        update=PPOUpdate(epochs=1, minibatch_size=64),
    )
    update = module.update_means.update
    module.update_means.update = lambda values: (seen.append(values), update(values))
    data = PromptDataModule(Rows(WORLD.load("prompts")["train"]), batch_size=64, split=Split(validation=0))
    fit(module, data, base, max_steps=1)
    apart, first = seen[:2]  # the engine's log-probabilities against the forward's, and what the first step counted
    assert apart["sampling/sampling_logp_difference/max"][0].item() < 1e-4
    ratio, tokens = first["val/ratio"]
    assert (ratio / tokens).item() == pytest.approx(1, abs=1e-5)
    assert first["policy/approxkl_avg"][0].item() == pytest.approx(0, abs=1e-6)
    assert first["policy/clipfrac_avg"][0].item() == 0
