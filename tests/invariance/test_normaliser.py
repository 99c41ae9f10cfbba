"""What is differentiated is what is logged: the mean over the tokens (or pairs) of the whole optimizer step.

That steps of 8 x 1, 4 x 2 and 1 x 8 rows agree, the last one being short, is test_layouts.py; here is what they agree on.
trl#2617, #6024; OpenRLHF#1249; verl#906; open-instruct#1137: sums were divided by the wrong count.
"""

import pytest
from datasets import Dataset, DatasetDict

from rlhf_lightning.data.demonstrations import DemonstrationDataModule
from rlhf_lightning.data.sources import Source
from rlhf_lightning.data.splits import Split
from tests.invariance.rearrangements import PLAIN
from tests.invariance.subjects import SUBJECTS, batches, configured, scalar_folder, tokenizer
from tests.methods import methods_for

ROWS = {
    "text": [{"text": "a b c d e"}, {"text": "f"}, {"text": "g h a"}],
    "prompt and completion": [
        {"prompt": p, "completion": c} for p, c in (("a b", "c d e"), ("f", "g"), ("a", "h h h h"))
    ],
}


class Rows(Source):
    """Rows of a list."""

    def __init__(self, rows):
        self.rows = rows

    def load(self, kind):
        return DatasetDict(train=Dataset.from_list(self.rows))

    def tokenizer(self):
        return tokenizer()


@pytest.mark.parametrize("mask", ["completion", "all"])
@pytest.mark.parametrize("kind", ROWS)
def test_sft_divides_by_the_tokens_that_it_sums_over(kind, mask, tmp_path):
    """The first token of a text is predicted by nothing: it is neither in the sum nor in the count."""
    data = DemonstrationDataModule(Rows(ROWS[kind]), batch_size=3, split=Split(validation=0), mask=mask)
    data.prepare_data()
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch.normalizer.item() == batch.response_mask[:, 1:].sum().item()
    module = configured(SUBJECTS["sft"], "rotary", "", PLAIN)
    loss = module.training_step(batch, 0)
    assert loss.item() == pytest.approx(module.train_means.compute()["loss"].item(), rel=1e-6)


@pytest.mark.parametrize("subject", methods_for("logged mean"))
def test_the_loss_of_a_whole_step_is_the_logged_mean(subject, tmp_path):
    module = configured(SUBJECTS[subject], "rotary", scalar_folder(tmp_path, "rotary"), PLAIN)
    loss = module.training_step(batches(SUBJECTS[subject], PLAIN)[0], 0)
    assert loss.item() == pytest.approx(module.train_means.compute()["loss"].item(), rel=1e-6)
