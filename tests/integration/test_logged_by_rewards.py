"""What a reward logs itself is logged with the iteration or the validation in which it was called, and with no other."""

import pytest

from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.splits import Split
from rlhf_lightning.rewards.function import FunctionReward
from tests.integration import test_iterations as iterations
from tests.integration.test_iterations import Memory, policy  # noqa: F401


@pytest.mark.parametrize("method", ["ppo", "grpo", "online_dpo"])
def test_each_call_is_logged_where_it_was_made(policy, tmp_path, monkeypatch, method):  # noqa: F811
    """Three iterations, after each a validation with a call for sampled responses and one for greedy ones."""
    calls = []

    def count(completions, log_metric):
        calls.append(len(completions))
        log_metric("call", float(len(calls)))
        return [float(i) for i in range(len(completions))]

    def rows(source, batch_size, split):
        return PromptDataModule(source, batch_size=batch_size, split=Split(validation=0.3))

    monkeypatch.setattr(iterations, "PromptDataModule", rows)
    module = iterations.module_of(method, policy, iterations=3)
    module.scorer.reward = module.reward = FunctionReward(count)
    memory = Memory()
    validating = {"val_check_interval": 1, "limit_val_batches": 1, "logger": memory}
    iterations.fit(module, tmp_path, prompts=4, **validating)
    found = {
        name: [row[name] for row in memory.rows if name in row]
        for name in ("train/call", "eval/sampled/call", "eval/greedy/call")
    }
    assert found == {"train/call": [1, 4, 7], "eval/sampled/call": [2, 5, 8], "eval/greedy/call": [3, 6, 9]}
