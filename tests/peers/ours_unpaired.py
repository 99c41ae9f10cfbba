"""Runs our own KTO module under a Lightning Trainer for the same step and writes down the same things."""

from typing import Any

from datasets import Dataset

from rlhf_lightning.data.collate import UnpairedCollator
from rlhf_lightning.data.loaders import Placement, make_loader
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import KTOModule
from tests.peers.ours import Memory, Watch, fit, sgd
from tests.peers.problem import EOS, PAD, tokenizer
from tests.peers.unpaired_cases import ROWS, Unpaired, roles


def run(case: Unpaired, paths: dict[str, str]) -> dict[str, Any]:
    """One optimizer step of the case."""
    policy, reference = (ModelSpec(path=paths[role]) for role in roles(case))
    module = KTOModule(policy, case.loss, reference=reference, optimizer=sgd(0.0))
    module.tokenizer = tokenizer()
    rows = Dataset.from_dict(
        {
            "prompt_ids": [tokenizer()(row["prompt"])["input_ids"] for row in ROWS],
            "completion_ids": [[*tokenizer()(row["completion"])["input_ids"], EOS] for row in ROWS],
            "label": [row["label"] for row in ROWS],
            "length": list(range(len(ROWS))),  # "by length" keeps the order
        }
    )
    loader = make_loader(
        rows,
        UnpairedCollator(PAD, 64),
        batch_size=len(ROWS) // case.micro_batches,
        shuffle=False,
        seed=0,
        place=Placement(accumulate=case.micro_batches),
        num_workers=0,
        weights=[1] * len(ROWS),
        bucket_batches=1,
    )
    watch, memory = Watch("policy"), Memory()
    fit(module, loader, memory, callbacks=[watch], accumulate_grad_batches=case.micro_batches)
    return {
        "input_ids": [rows[: len(rows) // 2] for rows in watch.input_ids],
        "loss": watch.loss,
        "metrics": memory.metrics,
        "gradients": watch.gradients,
    }
