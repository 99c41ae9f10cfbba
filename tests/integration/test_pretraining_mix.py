"""PPO-ptx: text beside the prompts, its gradient beside PPO's; at a coefficient of 0 nothing has changed, bit for bit."""

import lightning.pytorch as pl
import pytest
import torch
from datasets import Dataset, DatasetDict

from rlhf_lightning.data.pretraining import PretrainingMixDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.sources import Source
from rlhf_lightning.data.splits import Split
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.losses import PPOLoss
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import PPOModule
from rlhf_lightning.modules.ppo_update import PPOUpdate
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.worlds import world_tokenizer
from tests.faults.faulty import Rows

TEXTS = ["it is red .", "the hat is blue .", "i do not know .", "you are right .", "have a nice day ."] * 3
LR = 0.5


class Texts(Source):
    def load(self, kind):
        return DatasetDict(train=Dataset.from_dict({"text": TEXTS}))

    def __str__(self):
        return "texts"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    torch.manual_seed(0)
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    network = load_causal_lm(ModelSpec(architecture={"model_type": "llama", **fields}), world_tokenizer())
    return ModelSpec(path=str(export_folder(network, world_tokenizer(), tmp_path_factory.mktemp("base") / "policy")))


def module_of(policy, **loss):
    return PPOModule(
        policy,
        None,
        FunctionReward(lambda completion_ids: [float(len(ids)) for ids in completion_ids]),
        sampling=SamplingParameters(max_new_tokens=4),
        loss=PPOLoss(**loss),
        update=PPOUpdate(epochs=1, minibatch_size=8, micro_batch_size=3, max_grad_norm=1e9),
        optimizer=lambda params: torch.optim.SGD(params, lr=LR),
    )


def mix(rows_per_prompt=2):
    return PretrainingMixDataModule(
        Rows(), Texts(), rows_per_prompt=rows_per_prompt, max_length=32, batch_size=8, split=Split(validation=0)
    )


def plain():
    return PromptDataModule(Rows(), batch_size=8, split=Split(validation=0))


def fit(module, data, folder, steps):
    pl.seed_everything(0, verbose=False)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings |= {"enable_checkpointing": False, "default_root_dir": folder, "num_sanity_val_steps": 0}
    pl.Trainer(max_steps=steps, **settings).fit(module, datamodule=data)
    return {name: weight.detach().clone() for name, weight in module.actor_critic.named_parameters()}


def test_without_a_coefficient_it_is_ppo_bit_for_bit(policy, tmp_path):
    one, other = fit(module_of(policy), plain(), tmp_path, 4), fit(module_of(policy), mix(), tmp_path, 4)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_first_step_adds_gamma_times_the_gradient_of_the_mean_of_the_texts_tokens(policy, tmp_path):
    gamma, seen = 0.7, []
    module = module_of(policy, ptx_coef=gamma)
    step = module._step
    module._step = lambda *args: (seen.append(args[2]), step(*args))[1]
    mixed, plain_step = fit(module, mix(), tmp_path, 1), fit(module_of(policy), mix(), tmp_path, 1)
    before, first = load_causal_lm(policy, world_tokenizer()), seen[0]
    assert first.input_ids.shape[0] == 16  # two rows a prompt, eight prompts, one minibatch
    total = count = 0
    for ids, real in zip(first.input_ids, first.attention_mask, strict=True):
        row = ids[real]
        logits = before(input_ids=row[None], use_cache=False).logits[0, :-1]
        total = total - torch.log_softmax(logits, -1).gather(-1, row[1:, None]).sum()
        count += len(row) - 1
    (total / count).backward()
    for name, weight in before.named_parameters():
        key = f"policy.network.{name}"
        moved = mixed[key] - plain_step[key]
        torch.testing.assert_close(moved, -LR * gamma * weight.grad, rtol=1e-3, atol=1e-6)


def test_each_prompt_brings_its_own_rows_whatever_the_order():
    data = mix(rows_per_prompt=2)
    data.setup("fit")
    collate, rows = data.collator(), data.rows["train"].remove_columns("length")
    one = collate((rows[[3, 0]], 1.0))
    other = collate((rows[[0, 3]], 1.0))
    width = min(one.pretraining.input_ids.shape[1], other.pretraining.input_ids.shape[1])
    assert torch.equal(one.pretraining.input_ids[:2, :width], other.pretraining.input_ids[2:, :width])
    assert "pretraining_number" not in one.columns
    assert one.pretraining.response_mask.sum() > 4 * 4  # all of the text is learnt


def test_a_coefficient_without_text_is_an_error(policy, tmp_path):
    with pytest.raises(UserError, match="PretrainingMixDataModule"):
        fit(module_of(policy, ptx_coef=1.0), plain(), tmp_path, 1)


def test_a_coefficient_below_zero_or_no_rows_are_errors():
    with pytest.raises(UserError, match="ptx_coef"):
        PPOLoss(ptx_coef=-1.0)
    with pytest.raises(UserError, match="rows_per_prompt"):
        mix(rows_per_prompt=0)
