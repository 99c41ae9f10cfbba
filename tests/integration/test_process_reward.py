"""A process reward model from rows to reward: it learns which steps are wrong, is exported, and scores partial solutions."""

import json
import random

import lightning.pytorch as pl
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_lightning.callbacks.export import export_module
from rlhf_lightning.cli import main
from rlhf_lightning.data.sources import Source
from rlhf_lightning.data.splits import Split
from rlhf_lightning.data.stepwise import StepwiseDataModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.losses import StepBCELoss
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import ProcessRewardModule
from rlhf_lightning.rewards.process import ProcessReward
from rlhf_lightning.rewards.reward import Samples
from rlhf_lightning.rewards.reward_model import RewardModelReward
from rlhf_lightning.worlds import SumsWorld

torch.set_num_threads(1)  # threads that wait for each other cost more than they give
WORLD = SumsWorld(solutions=64, held_out=8)


class Signs(Source):
    """Steps that are wrong where they take away, which a tiny network learns in seconds, and only if labels stand in place."""

    def load(self, kind):
        rng = random.Random(0)
        return DatasetDict({name: Dataset.from_list([self.row(rng) for _ in range(n)]) for name, n in SIZES.items()})

    def row(self, rng):
        signs = [rng.choice("++-") for _ in range(rng.randint(1, 4))]
        steps = [f"{rng.randint(0, 12)} {sign} {rng.randint(0, 12)}" for sign in signs]
        return {"prompt": f"{rng.randint(0, 12)} - 1 ?", "completions": steps, "labels": [s == "+" for s in signs]}

    def tokenizer(self):
        return WORLD.tokenizer()


SIZES = {"train": 2000, "validation": 200}


def trainer(folder, **more):
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(**settings | {"enable_checkpointing": False, "default_root_dir": folder} | more)


def fitted(folder, tiny, data=None, steps=150):
    pl.seed_everything(0, verbose=False)
    module = ProcessRewardModule(
        ModelSpec(architecture=tiny), optimizer=lambda params: torch.optim.AdamW(params, lr=5e-3), separator=";"
    )
    run = trainer(folder, max_steps=steps, num_sanity_val_steps=0, check_val_every_n_epoch=10**6)
    run.fit(module, datamodule=data or StepwiseDataModule(Signs(), batch_size=64))
    return module, run


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """The module after training, its figures on held-out sums, and its export."""
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("process")
    module, run = fitted(folder, TINY)
    (figures,) = run.validate(module, datamodule=run.datamodule, verbose=False)
    return module, figures, str(export_module(module, folder / "export"))


def test_it_finds_the_first_wrong_step_of_solutions_it_has_never_seen(learnt):
    """Untrained it is a coin for each step; calling everything right would give an F1 of 0."""
    _, figures, _ = learnt
    assert figures["eval/first_error/f1"] > 0.9
    assert figures["eval/accuracy"] > 0.95
    assert figures["eval/loss"] < 0.15
    assert figures["eval/mean_score"] == pytest.approx(figures["eval/mean_label"], abs=0.05)
    both = figures["eval/first_error/on_erroneous"], figures["eval/first_error/on_correct"]
    assert figures["eval/first_error/f1"] == pytest.approx(2 * both[0] * both[1] / sum(both), rel=1e-5)


def test_exported_it_gives_the_same_scores_to_plain_transformers(learnt):
    path = learnt[2]
    reward = ProcessReward(path)
    reward.prepare("cpu")
    steps = ["7 + 5", "12 - 3"]
    (scores,) = reward.step_scores(["7 + 5 ?"], [steps])
    network, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(path).eval(),
        AutoTokenizer.from_pretrained(path),
    )
    assert network.config.step_separator == ";"
    ids = torch.tensor([tokenizer("7 + 5 ? 7 + 5 ; 12 - 3 ;").input_ids])
    with torch.no_grad():
        hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
        expected = network.score(hidden)[0, :, 0].sigmoid()[ids[0] == tokenizer.convert_tokens_to_ids(";")]
    assert scores == pytest.approx(expected.tolist(), abs=1e-5)


def test_later_steps_change_no_earlier_score(learnt):
    reward = ProcessReward(learnt[2], batch_size=3)
    reward.prepare("cpu")
    prompt, steps = "7 + 5 ?", ["7 + 5", "12 - 3", "8 + 6"]
    beginnings = [steps[:1], steps[:2], steps, [*steps[:2], "0 - 0"]]
    scores = reward.step_scores([prompt] * 4, beginnings)
    for row in scores:
        assert row[: min(len(row), 2)] == pytest.approx(scores[2][: min(len(row), 2)], abs=1e-6)
    assert scores[2][0] > 0.9
    assert scores[2][1] < 0.1
    alone = [reward.step_scores([prompt], [row])[0] for row in beginnings]
    for row, other in zip(scores, alone, strict=True):
        assert row == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize(("how", "combine"), [("product", torch.prod), ("minimum", torch.min), ("mean", torch.mean)])
def test_a_response_is_split_at_the_separator_and_worth_what_its_steps_are(learnt, how, combine):
    reward = ProcessReward(learnt[2], aggregation=how)
    reward.prepare("cpu")
    prompts = ["7 - 5 ?", "1 + 2 ?", "1 - 1 ?"]
    texts = ["7 + 5 ; 12 + 3 ; 9 + 6", "1 - 2 ;", ""]
    scores = reward.score(Samples(prompts, texts, [[]] * 3, [False, False, True]))
    parts = reward.step_scores(prompts, [["7 + 5", "12 + 3", "9 + 6"], ["1 - 2"], [""]])
    expected = [combine(torch.tensor(part)).item() for part in parts]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert scores[0] > 0.8 > 0.2 > scores[1]
    logs = ProcessReward(learnt[2], aggregation=how, log=True)
    logs.prepare("cpu")
    torch.testing.assert_close(
        logs.score(Samples(prompts, texts, [[]] * 3, [False] * 3)), scores.log(), atol=1e-5, rtol=1e-5
    )


def test_what_is_shown_has_a_probability_behind_each_step(learnt):
    module, *_ = learnt
    data = StepwiseDataModule(Signs(), batch_size=4)
    data.trainer = module.trainer
    data.prepare_data()
    batch = next(iter(data.val_dataloader()))
    first = module.show(batch, 2)[0]
    labelled = int(batch.step_mask[0].sum())
    assert first.prompt.endswith("?")
    assert first.response.count(" [0.") + first.response.count(" [1.") == labelled
    probabilities = [float(part.split("]")[0]) for part in first.response.split(" [")[1:]]
    assert first.score == pytest.approx(torch.tensor(probabilities).prod().item(), abs=0.02)


# ---------------------------------------------------------------- what the loss is a mean of


class Few(Source):
    """Solutions of one and of three steps."""

    def load(self, kind):
        rows = [("1 + 1 ?", ["1 + 1 = 2"], [1.0]), ("1 + 2 ?", ["1 + 2 = 3", "3 = 3", "3 = 4"], [1.0, 0.5, 0.0])]
        names = ("prompt", "completions", "labels")
        return DatasetDict(train=Dataset.from_list([dict(zip(names, row, strict=True)) for row in rows]))

    def tokenizer(self):
        return WORLD.tokenizer()


@pytest.mark.parametrize(("last_only", "steps"), [(False, 4), (True, 2)])
def test_the_loss_is_the_mean_over_the_labelled_steps(tmp_path, tiny, last_only, steps):
    """Not the mean of each solution's mean. A head of zeros gives ln 2 for every step."""
    data = StepwiseDataModule(Few(), batch_size=2, split=Split(validation=0), train_on_last_step_only=last_only)
    module, _ = fitted(tmp_path, tiny, data=data, steps=1)
    (batch,) = data.train_dataloader()
    assert batch.normalizer.item() == batch.step_mask.sum().item() == steps
    table = module(batch).detach()
    losses = torch.nn.functional.binary_cross_entropy_with_logits(table, batch.labels, reduction="none")
    expected = losses[batch.step_mask].mean()
    torch.testing.assert_close(module.training_step(batch, 0), expected)
    module.network.network.score.weight.data.zero_()
    assert module.training_step(batch, 0).item() == pytest.approx(0.693147, abs=1e-6)


def test_a_hardened_label_is_right_if_anything_led_on():
    loss, labels = StepBCELoss(harden=True), torch.tensor([0.0, 0.125, 1.0])
    expected = StepBCELoss().steps(torch.ones(3), torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(loss.steps(torch.ones(3), labels), expected)


# ---------------------------------------------------------------- what is refused


def test_two_separators_are_refused(tmp_path, tiny):
    data = StepwiseDataModule(Few(), separator="?", split=Split(validation=0))
    with pytest.raises(UserError, match=r"'\?' .* ';'; set model.separator"):
        fitted(tmp_path, tiny, data=data)


def test_going_on_from_a_model_with_another_separator_is_refused(learnt):
    module = ProcessRewardModule(ModelSpec(path=learnt[2]), separator="?")
    with pytest.raises(UserError, match=r"separator ';'; set model.separator"):
        module.configure_model()


def test_the_two_kinds_of_reward_models_are_not_taken_for_each_other(learnt, tmp_path, tiny):
    with pytest.raises(UserError, match="ProcessReward"):
        RewardModelReward(learnt[2]).prepare("cpu")
    tokenizer = WORLD.tokenizer()
    network = load_scalar_model(ModelSpec(architecture=tiny), tokenizer, new_head=True)
    path = str(export_folder(network, tokenizer, tmp_path / "reward"))
    with pytest.raises(UserError, match="no process reward model"):
        ProcessReward(path).prepare("cpu")
    with pytest.raises(UserError, match="prepare"):
        ProcessReward(path).score(Samples(["1 ?"], ["1"], [[]], [False]))


def test_a_step_with_the_separator_in_it_is_refused(learnt):
    reward = ProcessReward(learnt[2])
    reward.prepare("cpu")
    with pytest.raises(UserError, match="step 1 holds the separator"):
        reward.step_scores(["1 + 1 ?"], [["1 ; 1"]])


def test_a_run_from_the_command_line_is_exported_again_with_its_separator(tmp_path, tiny, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--model", "ProcessRewardModule", "--model.network.architecture", json.dumps(tiny)]
    args += ["--model.separator", ";", "--data", "StepwiseDataModule", "--data.source", "SumsWorld"]
    args += ["--data.source.solutions", "64", "--data.source.held_out", "8", "--trainer.max_steps", "2"]
    args += ["--trainer.accelerator", "cpu", "--wandb", "disabled", "--trainer.enable_progress_bar", "false"]
    main([*args, "--trainer.default_root_dir", "run", "--samples.every_n_steps", "1"])
    main(["export", "--run", "run", "--output", "again"])
    for folder in ("run/export", "again"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["step_separator"] == ";"
    one, other = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("run/export", "again"))
    assert one == other
