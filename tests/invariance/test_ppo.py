"""PPO's own promises: the first look back is at the policy that sampled, and steps are counted as they are taken.

Advantages against brute force, with masks, truncation and the place of the score, are in tests/unit/functional
(test_advantages.py, test_token_rewards.py) and tests/unit/rollouts/test_estimators.py (verl#50, #1440; trl#3750); that rows
stay whole through shuffling in tests/unit/rollouts/test_buffer.py (open-instruct#1484, verl#2506).
"""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from rlhf_lightning.modules.ppo import PPOUpdate
from tests.invariance.rearrangements import PLAIN
from tests.invariance.subjects import ARCHITECTURES, SUBJECTS, Memory, batches, configured, scalar_folder

SUBJECT = "ppo", "ppo, shared trunk"


class Steps(pl.Callback):
    """Counts what optimizers do."""

    def __init__(self) -> None:
        self.taken = 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.taken += 1


def fitted(subject, architecture, folder, update, **settings):
    """Three iterations of eight, two and one prompts."""
    module = configured(SUBJECTS[subject], architecture, scalar_folder(folder, architecture), PLAIN)
    module.update = update
    steps, memory = Steps(), Memory()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(accelerator="cpu", logger=memory, callbacks=[steps], **{"max_epochs": 1} | quiet | settings)
    rows = batches(SUBJECTS[subject], PLAIN)
    rows = [rows[0], *(select(rows[1], index) for index in ([0, 1], [2]))]
    trainer.fit(module, DataLoader(rows, batch_size=None, collate_fn=lambda batch: batch))
    return trainer, module, steps.taken, memory.rows


def select(batch, rows):
    columns = {name: [values[row] for row in rows] for name, values in batch.columns.items()}
    prompts = [batch.prompts[row] for row in rows]
    return batch._replace(
        input_ids=batch.input_ids[rows], attention_mask=batch.attention_mask[rows], prompts=prompts, columns=columns
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("subject", SUBJECT)
def test_the_first_look_back_finds_the_ratio_one(subject, architecture, tmp_path):
    """One step an iteration, temperature 0.7, prompts padded on the left, responses in other micro-batches than when sampled.

    verl#2996, #6280: log-probabilities of rollout and update differed on-policy.
    """
    update = PPOUpdate(epochs=1, minibatch_size=8, micro_batch_size=3)
    _, _, _, logged = fitted(subject, architecture, tmp_path, update)
    for row in logged:
        assert row["train/val/ratio"] == pytest.approx(1, abs=1e-6)
        assert row["train/policy/approxkl_avg"] == pytest.approx(0, abs=1e-10)
        assert row["train/val/ratio_var"] == pytest.approx(0, abs=1e-6)
        assert row["train/policy/clipfrac_avg"] == row["train/val/clipfrac_avg"] == 0
    # The surrogate at ratio 1 is minus the mean of whitened advantages: zero.
    assert logged[0]["train/loss/policy_avg"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("subject", SUBJECT)
def test_global_step_is_the_number_of_optimizer_steps(subject, tmp_path):
    """pytorch-lightning#17958: two optimizers under manual optimization counted every step twice."""
    update = PPOUpdate(epochs=2, minibatch_size=3)  # 8 prompts: 3 minibatches; then 1 and 1
    trainer, module, taken, logged = fitted(subject, "rotary", tmp_path, update)
    assert trainer.global_step == taken == 2 * (3 + 1 + 1)
    assert [row["step"] for row in logged] == [6, 8, 10]
    assert module.iteration == 3
    assert len(module.optimizers().param_groups) == 2


def test_max_steps_counts_the_same_steps(tmp_path):
    trainer, module, taken, _ = fitted("ppo", "rotary", tmp_path, PPOUpdate(epochs=2, minibatch_size=3), max_steps=8)
    assert trainer.global_step == taken == 8
    assert module.iteration == 2


def test_the_reference_stays_what_it_was(tmp_path):
    module = configured(SUBJECTS["ppo"], "rotary", scalar_folder(tmp_path, "rotary"), PLAIN)
    before = {name: value.clone() for name, value in module.reference.network.state_dict().items()}
    rows = batches(SUBJECTS["ppo"], PLAIN)
    settings = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, **settings)
    trainer.fit(module, DataLoader(rows, batch_size=None, collate_fn=lambda batch: batch))
    assert all(torch.equal(value, before[name]) for name, value in module.reference.network.state_dict().items())
