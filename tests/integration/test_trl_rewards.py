"""Plain functions as rewards in a run: they learn where it is, and what they log arrives."""

import json

import lightning.pytorch as pl
import pytest
import torch

from rlhf_lightning.callbacks.predictions import PredictionLines
from rlhf_lightning.callbacks.samples import COLUMNS, SampleTable, as_table
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.splits import Split
from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.worlds import world_tokenizer
from tests.faults.faulty import Rows
from tests.integration.test_iterations import fit, module_of, policy  # noqa: F401
from tests.invariance.subjects import Memory

SEEN = []


def everything(completions, completion_ids, trainer_state, log_extra, log_metric):
    SEEN.append((trainer_state.global_step, trainer_state.max_steps, trainer_state.epoch))
    log_extra("tokens", [len(ids) for ids in completion_ids])
    log_metric("mean_id", sum(map(sum, completion_ids)) / len(completion_ids))
    return [float(sum(ids)) for ids in completion_ids]


def run(policy, folder, method="ppo", reward=everything, validation=False, callbacks=(), **trainer):  # noqa: F811
    SEEN.clear()
    module = module_of(method, policy, iterations=5)
    module.reward = module.scorer.reward = FunctionReward(reward)
    memory = Memory()
    pl.seed_everything(0, verbose=False)
    settings = {"accelerator": "cpu", "logger": memory, "enable_progress_bar": False, "enable_model_summary": False}
    settings |= {"enable_checkpointing": False, "default_root_dir": folder, "num_sanity_val_steps": 0, "max_epochs": -1}
    runner = pl.Trainer(callbacks=list(callbacks), **settings | trainer)
    data = PromptDataModule(Rows(held_out=validation), batch_size=8, split=Split(validation=0))
    runner.fit(module, data)
    return module, memory.rows, runner, data


@pytest.mark.parametrize(("method", "steps"), [("ppo", 2), ("grpo", 4), ("online_dpo", 4)])
def test_a_function_is_told_the_step_and_what_it_logs_is_logged(policy, tmp_path, method, steps):  # noqa: F811
    _, rows, _, _ = run(policy, tmp_path, method)
    assert [seen[:2] for seen in SEEN] == [(steps * i, steps * 5) for i in range(5)]
    assert [seen[2] for seen in SEEN] == [0.0, 0.25, 0.5, 0.75, 1.0]
    name = "train/reward" if method == "grpo" else "train/objective/scores"
    assert [row["train/mean_id"] for row in rows] == pytest.approx([row[name] for row in rows])


def test_several_calls_of_an_iteration_are_one_mean(policy, tmp_path):  # noqa: F811
    """Dynamic sampling draws prompt after prompt."""
    from rlhf_lightning.modules.grpo_update import Groups

    module = module_of("grpo", policy, iterations=1, minibatch_size=2)
    object.__setattr__(module, "groups", Groups(size=2, prompts=5))
    calls = []

    def logging(completion_ids, log_metric):
        calls.append(float(len(calls)))
        log_metric("calls", calls[-1])
        return [0.0] * len(completion_ids)  # never a signal: all prompts of the batch are drawn

    module.reward = module.scorer.reward = FunctionReward(logging)
    memory = Memory()
    fit(module, tmp_path, logger=memory)
    assert len(calls) > 1
    assert memory.rows[0]["train/calls"] == pytest.approx(sum(calls) / len(calls))


def test_validations_log_what_a_function_logs_of_each_way_to_answer(policy, tmp_path):  # noqa: F811
    _, rows, _, _ = run(policy, tmp_path, validation=True, max_epochs=1)
    found = [row for row in rows if "eval/sampled/score" in row][-1]
    assert found["eval/sampled/mean_id"] == pytest.approx(found["eval/sampled/score"])
    assert found["eval/greedy/mean_id"] == pytest.approx(found["eval/greedy/score"])


def test_a_name_of_the_method_itself_is_refused(policy, tmp_path):  # noqa: F811
    def takes_a_name(completion_ids, log_metric):
        log_metric("learning_rate", 1.0)
        return [0.0] * len(completion_ids)

    with pytest.raises(
        UserError, match=r"takes_a_name: log_metric\('learning_rate'\) is a name that PPOModule logs itself"
    ):
        run(policy, tmp_path, reward=takes_a_name)


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_logged_columns_are_in_the_table_of_samples_and_in_predictions(policy, tmp_path, method):  # noqa: F811
    table = SampleTable(every_n_steps=1, count=2)
    module, _, runner, data = run(policy, tmp_path, method, validation=True, callbacks=[table, PredictionLines()])
    columns, cells = as_table(table.rows)
    assert columns == [*COLUMNS, "tokens"]
    assert all(1 <= row[-1] <= 3 for row in cells)
    assert as_table([[1, "p", "r", 0.5], *table.rows])[1][0] == [1, "p", "r", 0.5, None]
    assert torch.equal(torch.tensor(len(cells)), torch.tensor(10))
    runner.predict(module, data)
    line = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])
    assert {"prompt", "response", "score", "tokens"} <= line.keys()


def test_special_tokens_of_the_tokenizer_are_found_in_responses():
    from rlhf_lightning.rollouts.collect import special_tokens_in

    tokenizer = world_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    think, word = tokenizer.convert_tokens_to_ids(["<think>", "green"])
    assert special_tokens_in([[word], [word, think]], tokenizer) == ("<think>",)
    assert special_tokens_in([[word], []], tokenizer) == ()
    assert tokenizer.decode([word, think], skip_special_tokens=True).strip() == "green"


def test_a_random_policy_that_samples_special_tokens_is_warned_about_once(policy, tmp_path, caplog):  # noqa: F811
    seen = []

    def look(completions):
        seen.extend(c[0]["content"] for c in completions)
        return [0.0] * len(completions)

    module = module_of("ppo", policy, iterations=8)
    module.reward = module.scorer.reward = FunctionReward(look)
    fit(module, tmp_path, prompts=32)
    assert caplog.text.count("look scores text without special tokens") == 1
    tokenizer = world_tokenizer()
    assert not any(token in text for text in seen for token in tokenizer.all_special_tokens)
    seen.clear()
    caplog.clear()
    module = module_of("ppo", policy, iterations=8)
    module.reward = module.scorer.reward = FunctionReward(look, skip_special_tokens=False)
    fit(module, tmp_path, prompts=32)
    assert "without special tokens" not in caplog.text
    assert any(token in text for text in seen for token in tokenizer.all_special_tokens)
